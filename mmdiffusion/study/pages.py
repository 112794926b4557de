# SPDX-License-Identifier: MIT
"""The pages of a study, as a WSGI application of Flask.

A rater is known by a random token in a cookie, a film by an id that is random for each rater; both count only as far as
the database has them. Films are found by that id alone, so a request never names a file. The pages work without
scripts, which add to them: the play button, keys, and that focus moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmdiffusion.study.votes import QUESTIONS, Study, VoteRefused, extra

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
    flask = extra("flask")
    app = flask.Flask("mmdiffusion.study", static_folder="static", template_folder="templates")
    app.config.update(MAX_CONTENT_LENGTH=_REQUEST_BYTES, MAX_FORM_MEMORY_SIZE=_REQUEST_BYTES, MAX_FORM_PARTS=_FIELDS)
    cookie = f"rater-{study.id}"

    def token() -> str:
        return flask.request.cookies.get(cookie, "")

    def refusal(why: str, status: int) -> tuple[str, int]:
        return flask.render_template("message.html", title="That did not work", said=why), status

    def page_of(item: Any, chosen: Any = None, missing: Any = ()) -> str:
        questions = [(name, *_LEGENDS[name]) for name in QUESTIONS[item.part]]
        return flask.render_template(
            "film.html", item=item, questions=questions, chosen=chosen or {}, missing=list(missing)
        )

    @app.get("/")
    def show() -> Any:
        if not study.knows(token()):
            return flask.render_template("begin.html", count=_length(study))
        item = study.next_item(token())
        if item is None:
            return flask.render_template(
                "message.html", title="Thank you", said="That was the last film. All of your answers are counted."
            )
        return page_of(item)

    @app.post("/begin")
    def begin() -> Any:
        response = flask.redirect("/", 303)
        if not study.knows(token()):
            response.set_cookie(
                cookie,
                study.begin(),
                max_age=_COOKIE_SECONDS,
                httponly=True,
                samesite="Lax",
                secure=flask.request.is_secure,
            )
        return response

    @app.post("/vote/<item>")
    def vote(item: str) -> Any:
        form = flask.request.form
        if any(len(form.getlist(name)) != 1 for name in form):
            raise VoteRefused(400, "an answer came more than once")
        shown = study.next_item(token())
        if shown is not None and shown.id == item and set(form) < set(QUESTIONS[shown.part]):
            return page_of(shown, form, [name for name in QUESTIONS[shown.part] if name not in form]), 400
        study.vote(token(), item, form)
        return flask.redirect("/", 303)

    @app.get("/film/<item>")
    def film(item: str) -> Any:
        path = study.film(token(), item)
        if path is None:
            return refusal("This film is not in your list, or not yet.", 404)
        kind = "video/webm" if path.suffix == ".webm" else "video/mp4"
        response = flask.send_file(path.resolve(), kind, conditional=True, etag=item, max_age=3600)
        del response.headers["Content-Disposition"]  # it names the file, which all raters share
        return response

    @app.errorhandler(VoteRefused)
    def refused(error: VoteRefused) -> Any:
        return refusal(f"{str(error)[0].upper()}{str(error)[1:]}.", error.status)

    @app.errorhandler(extra("werkzeug.exceptions").HTTPException)
    def other(error: Any) -> Any:
        return refusal(error.description or error.name, error.code or 500)

    @app.after_request
    def guarded(response: Any) -> Any:
        response.headers.update(_HEADERS)
        if flask.request.endpoint == "film" and response.status_code < 400:
            response.cache_control.public, response.cache_control.private = False, True
        elif flask.request.endpoint != "static":
            response.cache_control.no_store = True
        return response

    return app


def _length(study: Study) -> int:
    """Of a rater's list."""
    return study.ratings * len(study.sources) + 2 * study.guesses * (len(study.sources) - 1)
