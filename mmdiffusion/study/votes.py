# SPDX-License-Identifier: MIT
"""The folder of a study: its films, the list that each rater is given, and the votes, in SQLite.

Nothing is ever changed in it but by adding a rater with all of their list, or a vote with all of its answers, in one
transaction each. So a reload, a restart or a killed server loses nothing that was confirmed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import pathlib
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy

QUESTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "opinion": {"video": (1, 2, 3, 4, 5), "sound": (1, 2, 3, 4, 5), "fit": (1, 2, 3, 4, 5)},
    "turing": {"real": (0, 1)},
}
"""The questions of each part of a study, in its order, and the answers that each has."""

_VERSION = 1  # of the database
_DATABASE = "study.sqlite"
_HOLD = 3600.0  # seconds for which an unanswered item of a rater counts as if it had its vote
_RATERS = 100_000  # at most, so that a program that begins over and over fills no disk
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sources (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, is_real INTEGER NOT NULL) STRICT;
CREATE TABLE films (
  id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES sources, file TEXT NOT NULL UNIQUE, origin TEXT NOT NULL
) STRICT;
CREATE TABLE raters (id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, begun REAL NOT NULL) STRICT;
CREATE TABLE items (
  id TEXT PRIMARY KEY, rater INTEGER NOT NULL REFERENCES raters, position INTEGER NOT NULL,
  part TEXT NOT NULL, film INTEGER NOT NULL REFERENCES films,
  UNIQUE (rater, position), UNIQUE (rater, film)
) STRICT;
CREATE INDEX items_of_film ON items (film, part);
CREATE TABLE votes (
  item TEXT NOT NULL REFERENCES items, question TEXT NOT NULL, value INTEGER NOT NULL, time REAL NOT NULL,
  PRIMARY KEY (item, question)
) STRICT;
CREATE TRIGGER votes_are_not_replaced BEFORE INSERT ON votes
WHEN EXISTS (SELECT 1 FROM votes WHERE item = NEW.item AND question = NEW.question)
BEGIN SELECT RAISE(ABORT, 'votes are not replaced'); END;
""" + "".join(
    f"CREATE TRIGGER {table}_are_not_{past} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} are not {past}'); END;\n"
    for table in ("votes", "items", "raters", "films", "sources")  # votes, and what they are votes on
    for verb, past in (("UPDATE", "changed"), ("DELETE", "removed"))
)


class VoteRefused(ValueError):
    """Why a vote does not count.

    Attributes:
        status: of HTTP, which says the same.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Item:
    """One film of a rater's list.

    Attributes:
        id: opaque, and of this rater and film alone.
        part: of QUESTIONS.
        position, count: its place in the list, from 0, and how many there are.
        is_first: whether its part begins with it.
        after: the id of the one after it, or "".
    """

    id: str
    part: str
    position: int
    count: int
    is_first: bool
    after: str


@dataclasses.dataclass(frozen=True)
class Vote:
    """An answer: who (a number from 0), which film, of which source, to which question."""

    rater: int
    film: int
    source: str
    question: str
    value: int


class Study:
    """A study's folder, to serve or to count.

    Attributes:
        path: the folder.
        id: of this study, for names that must not meet those of another one.
        sources: names of what is compared, and whether each is real; the real ones first.
        ratings, guesses: films of each source that a rater scores; films of each model that a rater judges to be real
            or generated, among as many real ones as there are of all models.

    Raises:
        FileNotFoundError, ValueError: if the folder has no study, or one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        if not (self.path / _DATABASE).is_file():
            raise FileNotFoundError(f"{self.path} has no {_DATABASE}; expected what `mmdiffusion study make` made")
        with self._reading() as found:
            settings = dict(found.execute("SELECT name, value FROM settings"))
            names = found.execute("SELECT name, is_real FROM sources ORDER BY id").fetchall()
            tables = {name for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            faults = [x for (x,) in found.execute("PRAGMA integrity_check(1)") if x != "ok"]
            faults += [f"a row of {x[0]} has none in {x[2]}" for x in found.execute("PRAGMA foreign_key_check")]
        if settings.get("version") != str(_VERSION):
            raise ValueError(f"{self.path} is of version {settings.get('version')}; expected {_VERSION}")
        numbers = [settings.get(name, "") for name in ("seed", "ratings", "guesses")]
        if not (
            {"films", "raters", "items", "votes"} <= tables
            and "id" in settings
            and all(x.isdecimal() for x in numbers)
            and [is_real for _, is_real in names] == [1] + [0] * (len(names) - 1)
            and len(names) > 1
        ):
            raise ValueError(f"{self.path / _DATABASE} is no whole study; expected what `mmdiffusion study make` made")
        if faults:
            raise ValueError(f"{self.path / _DATABASE} is damaged, and some votes may be lost: {faults[0]}")
        self.id = settings["id"]
        self._seed, self.ratings, self.guesses = map(int, numbers)
        self.sources = {name: bool(is_real) for name, is_real in names}

    @classmethod
    def create(
        cls,
        path: pathlib.Path,
        films: Mapping[str, Sequence[tuple[str, str]]],
        *,
        ratings: int,
        guesses: int,
        seed: int,
    ) -> Study:
        """A study of films that are in the folder already.

        Args:
            films: by source, the real one first: (name of its file in the folder, what it is a copy of).

        Raises:
            OSError: if there is one, or the folder cannot be written to.
        """
        descriptor = os.open(path / _DATABASE, os.O_CREAT | os.O_EXCL, 0o600)  # it says which films are real
        os.close(descriptor)
        settings = {"version": _VERSION, "id": secrets.token_hex(4), "seed": seed, "ratings": ratings}
        with _connected(path / _DATABASE) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(_SCHEMA)
            with _transaction(database):
                rows = [(name, str(value)) for name, value in {**settings, "guesses": guesses}.items()]
                database.executemany("INSERT INTO settings VALUES (?, ?)", rows)
                for number, (source, names) in enumerate(films.items()):
                    database.execute("INSERT INTO sources VALUES (?, ?, ?)", (number, source, int(number == 0)))
                    database.executemany(
                        "INSERT INTO films (source, file, origin) VALUES (?, ?, ?)",
                        [(number, file, origin) for file, origin in names],
                    )
        return cls(path)

    def begin(self) -> str:
        """A new rater with a list of films: the token, of which the folder keeps a digest alone.

        Raises:
            VoteRefused: if there are too many.
        """
        token = secrets.token_urlsafe(24)
        with self._reading() as database, _transaction(database):
            (number,) = database.execute("SELECT count(*) FROM raters").fetchone()
            if number >= _RATERS:
                raise VoteRefused(503, "the study has all the raters that it can have")
            row = (number, _digest(token), time.time())
            database.execute("INSERT INTO raters (id, token, begun) VALUES (?, ?, ?)", row)
            position = 0
            for part in QUESTIONS:  # one after the other, since no film comes twice
                for film in self._plan(database, number, part):
                    item = (secrets.token_urlsafe(16), number, position, part, film)
                    database.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?)", item)
                    position += 1
        return token

    def knows(self, token: str) -> bool:
        """Whether it is that of a rater."""
        with self._reading() as database:
            return _rater(database, token) is not None

    def next_item(self, token: str) -> Item | None:
        """The first item of a rater's list without a vote; None at its end."""
        with self._reading() as database:
            rows = _list(database, _rater(database, token))
        for at, (item, part, is_voted, _) in enumerate(rows):
            if not is_voted:
                after = rows[at + 1][0] if at + 1 < len(rows) else ""
                is_first = not at or rows[at - 1][1] != part
                return Item(item, part, at, len(rows), is_first, after)
        return None

    def film(self, token: str, item: str) -> pathlib.Path | None:
        """The film of an item of a rater's list, up to the one after that which is to be voted on; else None."""
        with self._reading() as database:
            rows = _list(database, _rater(database, token))
        waiting = 0
        for name, _, is_voted, file in rows:
            waiting += not is_voted
            if name == item and waiting <= 2:
                return self.path / "films" / file
        return None

    def vote(self, token: str, item: str, answers: Mapping[str, str]) -> None:
        """Count a vote, once; the same one again, of a browser that did not hear of it, is none.

        Raises:
            VoteRefused: if the item is not in the rater's list, is not the next one, or has another vote, or if the
                answers are not those that its questions have.
        """
        with self._reading() as database, _transaction(database):
            rows = _list(database, _rater(database, token))
            part = next((part for name, part, *_ in rows if name == item), None)
            if part is None:
                raise VoteRefused(404, "this film is not in your list")
            values = _checked(part, answers)
            before = dict(database.execute("SELECT question, value FROM votes WHERE item = ?", (item,)))
            if before == values:
                return
            if before:
                raise VoteRefused(409, "your answers for this film were counted already, and they stay")
            if item != next(name for name, _, is_voted, _ in rows if not is_voted):
                raise VoteRefused(409, "the films before this one come first")
            now = time.time()
            given = [(item, question, value, now) for question, value in values.items()]
            database.executemany("INSERT INTO votes VALUES (?, ?, ?, ?)", given)

    def votes(self) -> list[Vote]:
        """All answers, of raters who have finished and of those who have not.

        Raises:
            ValueError: if there is one that its question does not have, in a database that something else wrote to.
        """
        with self._reading() as database:
            rows = database.execute(
                "SELECT items.rater, items.film, sources.name, votes.question, votes.value FROM votes "
                "JOIN items ON items.id = votes.item JOIN films ON films.id = items.film "
                "JOIN sources ON sources.id = films.source ORDER BY items.rater, items.position, votes.rowid"
            ).fetchall()
        answers = {question: values for part in QUESTIONS.values() for question, values in part.items()}
        found = [Vote(*row) for row in rows]
        for vote in found:
            if vote.value not in answers.get(vote.question, ()):
                raise ValueError(
                    f"{self.path / _DATABASE} has the answer {vote.value} to {vote.question!r}; expected those that "
                    f"its pages take"
                )
        return found

    def raters(self) -> tuple[int, int]:
        """How many began, and how many came to the end."""
        with self._reading() as database:
            (begun,) = database.execute("SELECT count(*) FROM raters").fetchone()
            (open_,) = database.execute(
                "SELECT count(DISTINCT rater) FROM items WHERE id NOT IN (SELECT item FROM votes)"
            ).fetchone()
        return begun, begun - open_

    def _plan(self, database: sqlite3.Connection, rater: int, part: str) -> list[int]:
        """Films of one part of a rater's list, in their order."""
        models = [source for source, is_real in self.sources.items() if not is_real]
        each = dict.fromkeys(self.sources, self.ratings)
        if part == "turing":
            each = {source: self.guesses * (len(models) if is_real else 1) for source, is_real in self.sources.items()}
        random = numpy.random.default_rng([self._seed, list(QUESTIONS).index(part), rater])
        films: list[int] = []
        for source, count in each.items():
            # Those with the fewest votes, of this part, or to come; not those of the rater's other part.
            loads = database.execute(
                "SELECT films.id, count(items.id) FROM films JOIN sources ON sources.id = films.source "
                "LEFT JOIN (SELECT items.id, items.film FROM items JOIN raters ON raters.id = items.rater "
                " WHERE items.part = ? AND (raters.begun > ? OR items.id IN (SELECT item FROM votes))) AS items "
                "ON items.film = films.id "
                "WHERE sources.name = ? AND NOT EXISTS (SELECT 1 FROM items AS own WHERE own.rater = ? "
                " AND own.film = films.id) GROUP BY films.id",
                (part, time.time() - _HOLD, source, rater),
            ).fetchall()
            chosen = sorted(loads, key=lambda x: (x[1], random.random()))[:count]
            films += [chosen[place][0] for place in random.permutation(count)]
        return [films[place] for place in balanced_order(len(films), rater, self._seed)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _connected(self.path / _DATABASE) as database:
            yield database


def extra(name: str) -> Any:
    """A module of the extra `study`.

    Raises:
        ModuleNotFoundError: naming the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a study needs {error.name}, which is not installed: pip install -e '.[study]' in a clone of mmattn",
            name=error.name,
        ) from None


def balanced_order(count: int, rater: int, seed: int) -> list[int]:
    """The order in which a rater is shown `count` things: that of a row of a Williams design, whose labels are drawn
    anew each time that its rows have been used.

    Over each `count` raters (2 * count, if it is odd) each thing comes once (twice) at each place and once (twice)
    right after each other thing, so that neither what comes early nor what follows what can favour one of them. A rater
    can tell nothing from it, since the labels are random.
    """
    rows = count if count % 2 == 0 else 2 * count
    cycle, row = divmod(rater, rows)
    # 0, 1, n - 1, 2, n - 2, ...: neighbours differ by each number once. Its mirror is needed too if n is odd.
    first = [(at + 1) // 2 if at % 2 else (count - at // 2) % count for at in range(count)]
    if row >= count:
        first.reverse()
    labels = numpy.random.default_rng([seed, count, cycle, 2]).permutation(count)
    return [int(labels[(place + row) % count]) for place in first]


def _checked(part: str, answers: Mapping[str, str]) -> dict[str, int]:
    expected = {question: {str(value): value for value in values} for question, values in QUESTIONS[part].items()}
    if answers.keys() != expected.keys():
        raise VoteRefused(400, f"the answers are to {sorted(answers)}; expected {sorted(expected)}")
    for question, answer in answers.items():
        if answer not in expected[question]:
            raise VoteRefused(400, f"{question} is {answer[:20]!r}; expected one of {', '.join(expected[question])}")
    return {question: expected[question][answers[question]] for question in expected}


def _rater(database: sqlite3.Connection, token: str) -> int | None:
    found = database.execute("SELECT id FROM raters WHERE token = ?", (_digest(token),)).fetchone()
    return found[0] if found else None


def _list(database: sqlite3.Connection, rater: int | None) -> list[tuple[str, str, int, str]]:
    """(item, part, whether it has its vote, file), in the rater's order."""
    return database.execute(
        "SELECT items.id, items.part, EXISTS (SELECT 1 FROM votes WHERE votes.item = items.id), films.file "
        "FROM items JOIN films ON films.id = items.film WHERE items.rater = ? ORDER BY items.position",
        (rater,),
    ).fetchall()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


@contextlib.contextmanager
def _connected(path: pathlib.Path) -> Iterator[sqlite3.Connection]:
    """A connection for one piece of work; it waits for others, and a confirmed vote is on the disk."""
    database = None
    try:
        database = sqlite3.connect(path, timeout=20, isolation_level=None)
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA synchronous = FULL")
        yield database
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.OperationalError) and not str(error).startswith("no such"):
            raise OSError(f"{path} cannot be used: {error}") from error  # of the disk, or of who may write to it
        raise ValueError(f"{path} is no study: {error}") from error
    finally:
        if database is not None:
            database.close()


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, alone among those that write."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:  # a full disk has ended it
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
