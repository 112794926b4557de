# SPDX-License-Identifier: MIT
"""A study of films by people: blind pages with opinion scores and a Turing test, their votes, and what these say."""

from mmdiffusion.study.make import Made, make_study
from mmdiffusion.study.pages import make_app
from mmdiffusion.study.tally import Tally, tally
from mmdiffusion.study.votes import QUESTIONS, Study, VoteRefused

__all__ = ["QUESTIONS", "Made", "Study", "Tally", "VoteRefused", "make_app", "make_study", "tally"]
