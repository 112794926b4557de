# SPDX-License-Identifier: MIT
"""The jobs behind `mmdiffusion study`: make its folder, serve its pages, count its votes."""

from __future__ import annotations

import ipaddress
import json
import pathlib
import socket
import sys
from typing import Any

from mmdiffusion._files import said_of_files_beside
from mmdiffusion.runs.jobs import MakeStudy, ServeStudy, TallyStudy
from mmdiffusion.runs.processes import told_to_stop
from mmdiffusion.runs.results import files_of, said_if_not_written, write_texts
from mmdiffusion.study import Study, make_app, make_study, tally
from mmdiffusion.study.votes import extra

_THREADS = 8
_REQUEST_BYTES = 1 << 16  # before it reaches the pages, which take less


def make(job: MakeStudy) -> str:
    """Make it, and say what of."""
    sources = {"real": job.real, "ours": job.ours}
    for folder in job.other:
        if str(folder) in sources:
            raise ValueError(f"other is {folder}; expected a folder once, and not of the name of another source")
        sources[str(folder)] = folder
    seed = None if job.seed is None else job.seed % 2**64
    made = make_study(job.out, sources, ratings=job.ratings, guesses=job.guesses, seed=seed, progress=True)
    lines = [f"{job.out}: {', '.join(f'{count} films of {name}' for name, count in made.films.items())}"]
    lines += [f"left out {path}: {why}" for path, why in made.refused.items()]
    lines += said_of_files_beside(made.beside)
    lines += [f"{path}: no browser plays it, so it is in the study as H.264 and AAC" for path in made.transcoded]
    lines += made.cautions
    return "\n".join([*lines, f"next: mmdiffusion study serve {job.out}"])


def serve(job: ServeStudy) -> str:
    """Serve until SIGINT or SIGTERM, and say what there is then."""
    study = Study(job.study)
    sockets: dict[int, Any] = {}
    server = extra("waitress").create_server(
        make_app(study),
        map=sockets,
        sockets=[_listening(job.host, job.port)],
        threads=_THREADS,
        ident=None,  # what serves is nobody's business
        max_request_header_size=_REQUEST_BYTES,
        max_request_body_size=_REQUEST_BYTES,
    )
    with told_to_stop(server.pull_trigger) as signals:
        _announce(job.study, server.effective_host, server.effective_port)
        while not signals:
            extra("waitress.wasyncore").loop(map=sockets, count=1)
        # Its own end waits for whoever reads a film slowly. A vote that is cut off is counted, or not, as a whole.
        for connection in list(server.active_channels.values()):
            connection.handle_close()
        server.close()
        server.task_dispatcher.shutdown()
    begun, finished = study.raters()
    return f"{job.study} has {len(study.votes())} answers of {begun} raters, of whom {finished} came to the end"


def count(job: TallyStudy) -> str:
    """Count, write the tables, and return the one to print."""
    files = files_of(job.out, (".md", ".json", ".png"), job.force)
    found = tally(Study(job.study))
    if files:
        with said_if_not_written(found.markdown()):
            write_texts(files, {".md": found.markdown(), ".json": json.dumps(found.content(), indent=1)}, job.force)
            found.plot(files[".png"], may_replace=job.force)
    return found.markdown()


def _announce(study: pathlib.Path, host: str, port: int) -> None:
    sys.stdout.write(f"http://{f'[{host}]' if ':' in host else host}:{port}/ serves {study}; Ctrl-C ends it\n")
    if not ipaddress.ip_address(host).is_loopback:
        sys.stdout.write("whoever reaches this address can take part, over a connection that is not encrypted\n")
    sys.stdout.flush()


def _listening(host: str, port: int) -> socket.socket:
    """A socket at the first address of a name, so that no other address of it is open."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise OSError(f"host is {host!r} and port {port}: {error.strerror or error}") from error
    return listening
