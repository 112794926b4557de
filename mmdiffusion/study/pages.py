# SPDX-License-Identifier: MIT
"""The pages of a study, as a WSGI application of Flask.

A rater is known by a random token in a cookie, a film by an id that is random for each rater; both count only as far as
the database has them. Films are found by that id alone, so a request never names a file. The pages work without
scripts, which add to them: the play button, keys, and that focus moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mmdiffusion.study.votes import QUESTIONS, Item, Study, VoteRefused, extra

if TYPE_CHECKING:
    from flask import Flask

_REQUEST_BYTES = 8192
_FIELDS = 16
_COOKIE_SECONDS = 90 * 24 * 3600
_SCORES = {1: "bad", 2: "poor", 3: "fair", 4: "good", 5: "excellent"}
_LEGENDS = {
    "video": ("How good is the picture?", _SCORES),
    "sound": ("How good is the sound?", _SCORES),
    "fit": ("How well do picture and sound fit?", _SCORES),
    "real": ("Is this film real, or was it made by a computer?", {1: "real", 0: "made by a computer"}),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; media-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(study: Study) -> Flask:
    """The application, which `mmdiffusion study serve` runs; any WSGI server can, in several processes too.

    Raises:
        ModuleNotFoundError: without Flask, naming the extra that has it.
    """
    pages = _Pages(study)
    app: Flask = pages.flask.Flask("mmdiffusion.study", static_folder="static", template_folder="templates")
    app.config.update(MAX_CONTENT_LENGTH=_REQUEST_BYTES, MAX_FORM_MEMORY_SIZE=_REQUEST_BYTES, MAX_FORM_PARTS=_FIELDS)
    app.add_url_rule("/", view_func=pages.show)
    app.add_url_rule("/begin", view_func=pages.begin, methods=["POST"])
    app.add_url_rule("/vote/<item>", view_func=pages.vote, methods=["POST"])
    app.add_url_rule("/film/<item>", view_func=pages.film)
    app.register_error_handler(VoteRefused, pages.refused)
    app.register_error_handler(extra("werkzeug.exceptions").HTTPException, pages.failed)
    app.after_request(pages.guarded)
    return app


class _Pages:
    """What is answered to each request. Flask is an attribute, as the extra that has it may not be installed."""

    def __init__(self, study: Study) -> None:
        self.flask = extra("flask")
        self.study = study
        self.cookie = f"rater-{study.id}"

    def show(self) -> Any:
        """The film whose turn it is, or the page before the first, or after the last."""
        token = self._token()
        if not self.study.knows(token):
            return self.flask.render_template("begin.html", count=_length(self.study))
        item = self.study.next_item(token)
        if item is None:
            return self._message("Thank you", "That was the last film. All of your answers are counted.")
        return self._film_page(item)

    def begin(self) -> Any:
        """A new rater, unless it is one already."""
        response = self.flask.redirect("/", 303)
        if not self.study.knows(self._token()):
            is_encrypted = self.flask.request.is_secure
            response.set_cookie(
                self.cookie,
                self.study.begin(),
                max_age=_COOKIE_SECONDS,
                httponly=True,
                samesite="Lax",
                secure=is_encrypted,
            )
        return response

    def vote(self, item: str) -> Any:
        """Count the answers on a film; where some are missing, ask for them and keep the others."""
        form = self.flask.request.form
        if any(len(form.getlist(name)) != 1 for name in form):
            raise VoteRefused(400, "an answer came more than once")
        shown = self.study.next_item(self._token())
        if shown is not None and shown.id == item and set(form) < set(QUESTIONS[shown.part]):
            return self._film_page(shown, form, [name for name in QUESTIONS[shown.part] if name not in form]), 400
        self.study.vote(self._token(), item, form)
        return self.flask.redirect("/", 303)

    def film(self, item: str) -> Any:
        """The film itself, or the range of it that is asked for."""
        path = self.study.film(self._token(), item)
        if path is None:
            return self._refusal("This film is not in your list, or not yet.", 404)
        kind = "video/webm" if path.suffix == ".webm" else "video/mp4"
        response = self.flask.send_file(path.resolve(), kind, conditional=True, etag=item, max_age=3600)
        del response.headers["Content-Disposition"]  # it names the file, which all raters share
        return response

    def refused(self, error: VoteRefused) -> Any:
        return self._refusal(f"{str(error)[0].upper()}{str(error)[1:]}.", error.status)

    def failed(self, error: Any) -> Any:
        return self._refusal(error.description or error.name, error.code or 500)

    def guarded(self, response: Any) -> Any:
        """A response with the headers of all; only films and static files may be kept, films by the rater alone."""
        endpoint = self.flask.request.endpoint
        response.headers.update(_HEADERS)
        if endpoint == "film" and response.status_code < 400:
            response.cache_control.public, response.cache_control.private = False, True
        elif endpoint != "static":
            response.cache_control.no_store = True
        return response

    def _token(self) -> str:
        return self.flask.request.cookies.get(self.cookie, "")

    def _film_page(
        self, item: Item, chosen: Mapping[str, str] = MappingProxyType({}), missing: Sequence[str] = ()
    ) -> str:
        questions = [(name, *_LEGENDS[name]) for name in QUESTIONS[item.part]]
        return self.flask.render_template(
            "film.html", item=item, questions=questions, chosen=chosen, missing=list(missing)
        )

    def _message(self, title: str, said: str) -> str:
        return self.flask.render_template("message.html", title=title, said=said)

    def _refusal(self, why: str, status: int) -> tuple[str, int]:
        return self._message("That did not work", why), status


def _length(study: Study) -> int:
    """Of a rater's list."""
    return study.ratings * len(study.sources) + 2 * study.guesses * (len(study.sources) - 1)
