# SPDX-License-Identifier: MIT
"""A study from folders of films to its tally: by the pages' test client, and through a real browser."""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import numpy
import pytest

pytest.importorskip("av")
pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("krippendorff")
pytest.importorskip("diffusers")

from mmdiffusion import cli
from mmdiffusion.clips import ClipFormat
from mmdiffusion.data import SyntheticClips, to_clip
from mmdiffusion.media import open_film, write_audio, write_video
from mmdiffusion.runs import study as job
from mmdiffusion.runs.jobs import ServeStudy
from mmdiffusion.study import QUESTIONS, Study, make_app, make_study, tally
from mmdiffusion.study.tally import alpha, figure
from mmdiffusion.study.votes import Vote, balanced_order

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPINION = {"video": "4", "sound": "3", "fit": "5"}
COUNT = 10  # items of a rater: 2 ratings of 3 folders, 1 guess of 2 models, and 2 real ones
SECRETS = ("real/", "ours", "tats", "films/", "source", "origin", ".mp4", ".webm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Films of the synthetic world as if of three sources, and files of no use among them."""
    top = tmp_path_factory.mktemp("study")
    clips = SyntheticClips(ClipFormat((16, 3, 96, 96), (1, 25600)))
    numbers = itertools.count()
    for name, count in {"real": 6, "ours": 5, "tats": 4}.items():
        (top / name).mkdir()
        for number in range(count):
            write_video(top / name / f"{name}-{number}.mp4", *to_clip(clips[next(numbers)]))
    video, audio = to_clip(clips[99])
    write_video(top / "ours" / "silent.mp4", video)
    write_audio(top / "ours" / "unseen.wav", audio)
    (top / "tats" / "broken.mp4").write_bytes(b"no film")
    for name in ("ours/samples.json", "ours/sheet.png", "tats/README.md"):
        (top / name).write_text("no film")
    (top / "real" / ".hidden").mkdir()
    shutil.copy(top / "ours" / "ours-0.mp4", top / "real" / ".hidden" / "ours-0.mp4")
    return top


def sources(folders):
    return {name: folders / name for name in ("real", "ours", "tats")}


@pytest.fixture
def made(folders, tmp_path):
    return make_study(tmp_path / "study", sources(folders), ratings=2, guesses=1, seed=1)


@pytest.fixture
def study(made):
    return made.study


@pytest.fixture
def client(study):
    return make_app(study).test_client()


def database(study):
    return contextlib.closing(sqlite3.connect(study.path / "study.sqlite"))


def answers_of(part):
    return OPINION if part == "opinion" else {"real": "1"}


def status_of(client, path):
    with client.get(path) as answer:  # which closes the film
        return answer.status_code


def shown(page):
    return re.search(r'action="/vote/([\w-]+)"', page.get_data(as_text=True)).group(1)


def takes_part(study, answer=lambda source, question, rater: 1 if question == "real" else 3, rater=0):
    """A rater from the first film to the last, who answers by the film's source."""
    token = study.begin()
    with database(study) as found:
        names = dict(
            found.execute(
                "SELECT items.id, sources.name FROM items JOIN films ON films.id = items.film "
                "JOIN sources ON sources.id = films.source"
            )
        )
    while item := study.next_item(token):
        study.vote(token, item.id, {x: str(answer(names[item.id], x, rater)) for x in QUESTIONS[item.part]})


# The folder


def test_names_and_files_tell_nothing(made, folders):
    copies = sorted((made.study.path / "films").iterdir())
    assert len(copies) == 15 and all(re.fullmatch(r"[0-9a-f]{24}\.mp4", x.name) for x in copies)
    assert {x.stat().st_mtime for x in copies} == {0}
    with database(made.study) as found:
        origins = dict(found.execute("SELECT file, origin FROM films"))
    assert all(x.read_bytes() == pathlib.Path(origins[x.name]).read_bytes() for x in copies)
    assert made.films == {"real": 6, "ours": 5, "tats": 4} and not made.transcoded and not made.cautions
    assert (made.study.path / "study.sqlite").stat().st_mode & 0o077 == 0


def test_files_of_no_use_are_named(made, folders):
    assert made.refused.keys() == {str(folders / x) for x in ("ours/silent.mp4", "ours/unseen.wav", "tats/broken.mp4")}
    assert made.refused[str(folders / "ours/silent.mp4")] == "it has no sound"
    assert made.beside == [str(folders / x) for x in ("ours/samples.json", "ours/sheet.png", "tats/README.md")]
    assert made.refused[str(folders / "ours/unseen.wav")] == "it has no picture"


def test_what_browsers_do_not_play_is_transcoded_and_said(folders, tmp_path):
    """MPEG-4 in AVI, of another size: also cautioned against."""
    av = pytest.importorskip("av")
    others = shutil.copytree(folders / "tats", tmp_path / "others")
    with open_film(others / "tats-0.mp4") as film:
        video, audio = film.read_clip(size=(48, 50))
    with av.open(str(others / "tats-0.avi"), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10, width=50, height=48, pix_fmt="yuv420p")
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for x in ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(x, "rgb24")))
        container.mux(pictures.encode())
        samples = av.AudioFrame.from_ndarray((audio * 32767).short().numpy(), "s16", "mono")
        samples.sample_rate = 16000
        container.mux(sound.encode(samples))
    (others / "tats-0.mp4").unlink()
    made = make_study(tmp_path / "s", {**sources(folders), "tats": others}, ratings=2, guesses=1)
    assert made.transcoded == [str(others / "tats-0.avi")]
    for copy in (made.study.path / "films").iterdir():
        with open_film(copy) as film:
            assert film.plays_in_browsers and copy.suffix == ".mp4"
    assert "differ in size, rate or length" in made.cautions[0] and "96 x 96" in made.cautions[0]


def test_studies_that_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"tats has 4 films .* expected 5, .* ratings \(4\) .*1 \.md; .*broken.mp4: "):
        make_study(tmp_path / "s", sources(folders), ratings=4, guesses=1)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="is the same film as"):
        make_study(tmp_path / "s", {"real": folders / "real", "ours": folders / "real"}, ratings=1, guesses=1)
    with pytest.raises(NotADirectoryError, match="nowhere"):
        make_study(tmp_path / "s", {"real": folders / "nowhere", "ours": folders / "ours"})
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(FileExistsError, match="there exists"):
        make_study(tmp_path / "there", sources(folders), ratings=2, guesses=1)
    with pytest.raises(FileNotFoundError, match=r"has no study\.sqlite"):
        Study(tmp_path / "there")
    (tmp_path / "there" / "study.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match="is no study"):
        Study(tmp_path / "there")
    (tmp_path / "there" / "study.sqlite").write_bytes(b"")
    with pytest.raises(ValueError, match="is no study: no such table"):
        Study(tmp_path / "there")


@pytest.mark.parametrize(
    "damage",
    (
        "DROP TABLE votes",
        "DELETE FROM settings WHERE name = 'id'",
        "UPDATE settings SET value = 'x' WHERE name = 'seed'",
        "UPDATE settings SET value = '-3' WHERE name = 'ratings'",
        "DROP TRIGGER sources_are_not_changed; UPDATE sources SET is_real = 0",
        "DROP TRIGGER sources_are_not_removed; DELETE FROM sources",
    ),
)
def test_a_database_that_is_not_whole_is_refused(folders, tmp_path, damage):
    make_study(tmp_path / "study", sources(folders), ratings=2, guesses=1, seed=1)
    with contextlib.closing(sqlite3.connect(tmp_path / "study" / "study.sqlite")) as database:
        database.executescript(damage)
    with pytest.raises(ValueError, match=r"study\.sqlite is no whole study; expected what"):
        Study(tmp_path / "study")


def test_a_damaged_database_is_refused_or_whole(study):
    """Bytes changed anywhere, and zeros in the place of a page: no vote is lost in silence, and every refusal names the
    file.
    """
    for rater in range(3):
        takes_part(study, rater=rater)
    before, path = study.votes(), study.path / "study.sqlite"
    whole = path.read_bytes()
    random = numpy.random.default_rng(0)
    refused = 0
    for _ in range(60):
        content = numpy.frombuffer(whole, numpy.uint8).copy()
        if random.random() < 0.5:
            page = random.integers(len(whole) // 4096) * 4096
            content[page : page + 4096] = 0
        else:
            content[random.integers(len(whole), size=20)] = random.integers(256, size=20)
        path.write_bytes(content.tobytes())
        for journal in study.path.glob("study.sqlite-*"):
            journal.unlink()
        try:
            found = Study(study.path).votes()
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path) in str(error) or str(study.path) in str(error), error
        else:
            assert len(found) == len(before)
    assert refused > 30
    path.write_bytes(whole)
    assert Study(study.path).votes() == before


def test_answers_that_something_else_wrote_are_not_counted(study):
    token = study.begin()
    item = study.next_item(token).id
    with database(study) as found:
        found.execute("INSERT INTO votes VALUES (?, 'video', 7, 0)", (item,))
        found.commit()
    with pytest.raises(ValueError, match=r"study\.sqlite has the answer 7 to 'video'; expected those that its pages"):
        tally(study)
    with database(study) as found:
        found.execute("INSERT INTO votes VALUES ('nobody', 'video', 3, 0)")
        found.commit()
    with pytest.raises(ValueError, match=r"study\.sqlite is damaged.*: a row of votes has none in items"):
        Study(study.path)


def test_a_study_is_whole_or_absent(folders, tmp_path, monkeypatch, small_files):
    """On a full disk, and where another process was first."""
    (tmp_path / "out").mkdir()
    for size in (100, 30_000):  # of a film, of the database
        with small_files(size), pytest.raises(OSError, match=r"out/study/films/\w+\.mp4|study\.sqlite cannot be used"):
            make_study(tmp_path / "out" / "study", sources(folders), ratings=2, guesses=1)
        assert list((tmp_path / "out").iterdir()) == []
    create = Study.create

    def other_is_first(*args, **options):
        (tmp_path / "out" / "study").mkdir()
        (tmp_path / "out" / "study" / "theirs").touch()
        return create(*args, **options)

    monkeypatch.setattr(Study, "create", other_is_first)
    with pytest.raises(FileExistsError, match="out/study'"):
        make_study(tmp_path / "out" / "study", sources(folders), ratings=2, guesses=1)
    assert [x.name for x in (tmp_path / "out").rglob("*")] == ["study", "theirs"]


def test_a_vote_on_a_full_disk_is_an_error_of_the_system(folders, tmp_path, small_files):
    made = make_study(tmp_path / "study", sources(folders), ratings=2, guesses=1)
    with small_files(100), pytest.raises(OSError, match=r"study\.sqlite cannot be used: "):
        made.study.begin()
    assert made.study.raters() == (0, 0) and made.study.begin()


# Who sees what


@pytest.mark.parametrize("count", (1, 2, 3, 6, 7))
def test_orders_are_balanced(count):
    """Each thing at each place equally often, and right after each other thing equally often."""
    rows = count if count % 2 == 0 else 2 * count
    for cycle in range(2):
        orders = [balanced_order(count, rater, 5) for rater in range(cycle * rows, (cycle + 1) * rows)]
        assert all(sorted(x) == list(range(count)) for x in orders)
        places = collections.Counter((place, thing) for order in orders for place, thing in enumerate(order))
        assert len(places) == count**2 and set(places.values()) == {rows // count}
        pairs = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
        assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1
    assert count < 6 or balanced_order(count, 0, 5) != balanced_order(count, rows, 5)


def test_films_have_equal_votes(study):
    """Within one in the first part, which is chosen first; no rater sees a film twice."""
    for rater in range(12):
        takes_part(study, rater=rater)
    with database(study) as found:
        rows = found.execute(
            "SELECT films.source, films.id, items.part, count(items.id) FROM films "
            "JOIN items ON items.film = films.id GROUP BY films.id, items.part"
        ).fetchall()
        assert (
            found.execute("SELECT max(n) FROM (SELECT count(*) n FROM items GROUP BY rater, film)").fetchone()[0] == 1
        )
    for source, (part, slack) in itertools.product(range(3), (("opinion", 1), ("turing", 2))):
        loads = [n for s, _, p, n in rows if (s, p) == (source, part)]
        assert len(loads) == (6, 5, 4)[source] and max(loads) - min(loads) <= slack
    real = sum(n for source, _, part, n in rows if part == "turing" and source == 0)
    assert real == sum(n for source, _, part, n in rows if part == "turing" and source != 0) == 24


def test_who_leaves_does_not_hold_films(study, monkeypatch):
    """Films given to a rater who left without a vote are given first, an hour later."""
    now = time.time()
    monkeypatch.setattr("mmdiffusion.study.votes.time.time", lambda: now - 4000)
    study.begin()
    monkeypatch.undo()
    token = study.begin()
    with database(study) as found:
        held = found.execute("SELECT count(*) FROM items WHERE part = 'opinion'").fetchone()[0]
    assert held == 12 and study.next_item(token).count == COUNT
    takes_part(study)
    with database(study) as found:
        loads = found.execute(
            "SELECT count(*) FROM items WHERE rater > 0 AND part = 'opinion' GROUP BY film"
        ).fetchall()
    assert max(loads) == (1,)  # 12 of 15 films, of which none came twice though the first rater had 6 of them


# The pages


def test_a_rater_from_beginning_to_end(client, study):
    assert "Begin" in client.get("/").get_data(as_text=True)
    assert client.post("/begin").status_code == 303
    for number in range(COUNT):
        page = client.get("/")
        text = page.get_data(as_text=True)
        assert f'<h1 tabindex="-1">Film {number + 1} of {COUNT}</h1>' in text
        assert not [x for x in SECRETS if x in text], "the page tells"
        part = "opinion" if number < 6 else "turing"
        assert text.count("<fieldset") == text.count("<legend>") == len(QUESTIONS[part])
        assert text.count('<video src="/film/') == (number < COUNT - 1)  # that of the next one
        assert shown(client.get("/")) == shown(page)  # a reload
        assert client.post(f"/vote/{shown(page)}", data=answers_of(part)).status_code == 303
    assert "Thank you" in client.get("/").get_data(as_text=True)
    assert client.post("/begin").status_code == 303  # nothing new for who is known
    assert study.raters() == (1, 1) and len(study.votes()) == 6 * 3 + 4


def test_votes_survive_a_restart(client, study):
    client.post("/begin")
    client.post(f"/vote/{shown(client.get('/'))}", data=OPINION)
    cookie = client.get_cookie(f"rater-{study.id}")
    assert cookie.http_only and cookie.same_site == "Lax"
    again = make_app(Study(study.path)).test_client()
    again.set_cookie(cookie.key, cookie.value)
    assert f"Film 2 of {COUNT}" in again.get("/").get_data(as_text=True)


def test_a_second_vote_does_not_count(client, study):
    client.post("/begin")
    item = shown(client.get("/"))
    for data, status in ((OPINION, 303), (OPINION, 303), ({**OPINION, "fit": "1"}, 409)):
        assert client.post(f"/vote/{item}", data=data).status_code == status
    assert [x.value for x in study.votes()] == [4, 3, 5]


def test_votes_are_neither_changed_nor_removed(study):
    token = study.begin()
    study.vote(token, study.next_item(token).id, OPINION)
    with database(study) as found:
        for statement, said in (
            ("UPDATE votes SET value = 5", "votes are not changed"),
            ("DELETE FROM votes", "votes are not removed"),
            ("REPLACE INTO votes SELECT item, question, 5, time FROM votes", "votes are not replaced"),
            ("UPDATE OR REPLACE items SET film = film + 1", "items are not changed"),
            ("DELETE FROM raters", "raters are not removed"),
            ("UPDATE films SET source = 0", "films are not changed"),
            ("UPDATE sources SET name = 'theirs' WHERE is_real = 0", "sources are not changed"),
        ):
            with pytest.raises(sqlite3.IntegrityError, match=said):
                found.execute(statement)
    assert [x.value for x in study.votes()] == [4, 3, 5]


def test_votes_at_once_count_once(study):
    """Of different votes that arrive together one counts, whole."""
    token = study.begin()
    item = study.next_item(token).id

    def vote(number):
        try:
            study.vote(token, item, dict.fromkeys(OPINION, str(number % 5 + 1)))
        except ValueError:
            return 0
        return 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counted = sum(pool.map(vote, range(40)))
    assert counted == 8  # the same vote again is told that it is counted
    assert len(study.votes()) == 3 and len({x.value for x in study.votes()}) == 1


def test_raters_that_begin_at_once_have_lists_of_their_own(study):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: study.begin(), range(16)))
    assert study.raters() == (16, 0) and len({study.next_item(x).id for x in tokens}) == 16


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "Please answer every question"),
        ({"video": "1", "sound": "2"}, "Please answer every question"),
        ({**OPINION, "fit": "6"}, "Fit is &#39;6&#39;; expected one of 1, 2, 3, 4, 5"),
        ({**OPINION, "fit": "0"}, "expected one of"),
        ({**OPINION, "fit": "5.0"}, "expected one of"),
        ({**OPINION, "fit": "٣"}, "expected one of"),
        ({**OPINION, "fit": ["5", "1"]}, "more than once"),
        ({**OPINION, "real": "1"}, "The answers are to"),
        ({"real": "1"}, "The answers are to"),
    ],
)
def test_answers_that_no_question_has(client, study, data, said):
    client.post("/begin")
    answer = client.post(f"/vote/{shown(client.get('/'))}", data=data)
    assert answer.status_code == 400 and said in answer.get_data(as_text=True)
    assert not study.votes()
    if len(data) == 2:
        text = answer.get_data(as_text=True)
        assert text.count('class="missing"') == 1 and text.count(" checked") == 2  # what was answered stays


def test_what_is_not_the_raters(client, study):
    """Films and votes of another rater, of none, of films further on, and of made-up names."""
    app = make_app(study)
    other = app.test_client()
    for x in (client, other):
        x.post("/begin")
    item = shown(client.get("/"))
    assert other.post(f"/vote/{item}", data=OPINION).status_code == 404
    assert other.get(f"/film/{item}").status_code == 404
    assert app.test_client().get(f"/film/{item}").status_code == 404
    assert app.test_client().post(f"/vote/{item}", data=OPINION).status_code == 404
    with database(study) as found:
        items = [x for (x,) in found.execute("SELECT id FROM items WHERE rater = 0 ORDER BY position")]
        file = found.execute("SELECT file FROM films").fetchone()[0]
    assert items[0] == item
    assert [status_of(client, f"/film/{x}") for x in items[:4]] == [200, 200, 404, 404]
    assert client.post(f"/vote/{items[1]}", data=OPINION).status_code == 409
    assert client.post(f"/vote/{items[-1]}", data={"real": "1"}).status_code == 409
    names = (file, "../study.sqlite", "..%2fstudy.sqlite", "%2e%2e/study.sqlite", "....//study.sqlite", "", "'; --")
    for path in (*(f"/film/{x}" for x in names), "/static/../votes.py", "/static/..%2fvotes.py", "/study.sqlite"):
        assert client.get(path).status_code in (404, 405, 308), path
    client.set_cookie(f"rater-{study.id}", "forged")
    assert "Begin" in client.get("/").get_data(as_text=True)
    assert not study.votes()


def test_requests_that_are_too_large_or_odd(client):
    client.post("/begin")
    path = f"/vote/{shown(client.get('/'))}"
    assert client.post(path, data={**OPINION, "more": "x" * 100_000}).status_code == 413
    assert client.post(path, data=b"\xff\xfe", content_type="application/json").status_code == 400
    for odd in (client.get(path), client.post("/"), client.delete("/")):
        assert odd.status_code == 405 and "That did not work" in odd.get_data(as_text=True)


def test_films_are_sent_in_pieces_and_tell_nothing(client):
    client.post("/begin")
    item = shown(client.get("/"))
    with client.get(f"/film/{item}", headers={"Range": "bytes=0-99"}) as film:
        assert len(film.data) == 100
    assert film.status_code == 206 and film.mimetype == "video/mp4"
    assert film.headers["ETag"] == f'"{item}"' and "Content-Disposition" not in film.headers
    assert film.headers["Last-Modified"].endswith("1970 00:00:00 GMT")
    assert "private" in film.headers["Cache-Control"] and "public" not in film.headers["Cache-Control"]
    page = client.get("/")
    assert page.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"


# The tally


def test_means_shares_and_agreement(study):
    """Of raters who find real films good, ours middling and the others bad, and take ours for real half of the time."""
    score = {"real": 5, "ours": 3, "tats": 1}
    for rater in range(8):
        takes_part(
            study,
            lambda source, question, who: (
                {"real": 1, "ours": who % 2, "tats": 0}[source] if question == "real" else score[source]
            ),
            rater,
        )
    found = tally(study)
    for question in ("video", "sound", "fit"):
        assert {source: x.value for source, x in found.figures[question].items()} == score
        assert all(
            x.votes == 16 and x.raters == 8 and x.low == x.high == x.value for x in found.figures[question].values()
        )
        assert found.agreement[question] == pytest.approx(1)
    shares = found.figures["real"]
    assert [shares[x].value for x in score] == [1, 0.5, 0]
    assert 0.05 < shares["ours"].low < 0.3 and 0.7 < shares["ours"].high < 0.95
    assert shares["real"].high == 1 and 0.4 < shares["real"].low < 1  # not a point, though all said the same
    assert 0 < found.agreement["real"] < 1
    assert (found.begun, found.finished) == (8, 8)
    text = found.markdown()
    assert "| taken for real | 100% (" in text and "| video quality | 5.00 (5.00 to 5.00) |" in text
    content = json.loads(json.dumps(found.content(), allow_nan=False))
    assert content["figures"]["fit"]["ours"]["votes"] == 16


def test_intervals_cover_what_they_estimate():
    """Of raters and films that differ: the interval of a mean of scores, and that of a share, hold the truth about as
    often as they say; without regard to who votes they would hold it half as often.
    """
    random = numpy.random.default_rng(0)
    hits = {False: 0, True: 0}
    for seed in range(120):
        of_rater, of_film = random.normal(0, 0.7, 12), random.normal(0, 0.5, 15)
        votes: dict[bool, list[Vote]] = {False: [], True: []}
        for rater in range(12):
            for film in random.choice(15, 6, replace=False):
                x = of_rater[rater] + of_film[film] + random.normal(0, 0.5)
                votes[False].append(Vote(rater, int(film), "ours", "fit", x))
                votes[True].append(Vote(rater, int(film), "ours", "real", int(x > 0)))
        for is_share, truth in ((False, 0.0), (True, 0.5)):
            found = figure(votes[is_share], is_share, seed)
            hits[is_share] += found.low <= truth <= found.high
    assert all(0.87 <= x / 120 <= 1 for x in hits.values()), hits


def test_little_is_said_to_be_little(study):
    with pytest.raises(ValueError, match="has no votes yet"):
        tally(study)
    takes_part(study)
    found = tally(study)
    one = found.figures["video"]["ours"]
    assert one.value == 3 and math.isnan(one.low) and math.isnan(found.agreement["video"])
    assert json.loads(json.dumps(found.content(), allow_nan=False))["figures"]["video"]["ours"]["low"] is None
    assert "| video quality | 3.00 | 3.00 | 3.00 |  |" in found.markdown()


def test_agreement_of_a_published_example():
    """The example of Krippendorff (2011): four observers, twelve units; ordinal alpha 0.815."""
    rows = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    votes = [
        Vote(rater, film, "ours", "fit", int(x))
        for rater, row in enumerate(rows)
        for film, x in enumerate(row)
        if x != "."
    ]
    assert alpha(votes) == pytest.approx(0.815, abs=5e-4)


# The command


def command(capsys, *arguments):
    cli.main([str(x) for x in arguments])
    return capsys.readouterr().out


def test_the_command(folders, tmp_path, capsys):
    out = tmp_path / "study"
    said = command(
        capsys, "study", "make", "--real", folders / "real", "--ours", folders / "ours", "--other", folders / "tats",
        "--out", out, "--ratings", "2", "--guesses", "1",
    )  # fmt: skip
    assert f"{out}: 6 films of real, 5 films of ours, 4 films of {folders / 'tats'}" in said
    assert f"left out {folders / 'ours/silent.mp4'}: it has no sound" in said
    assert "\n3 files are no films: 1 .json, 1 .png, 1 .md\n" in said and "sheet.png" not in said
    for rater in range(3):
        takes_part(Study(out), rater=rater)
    said = command(capsys, "study", "tally", out, "--out", tmp_path / "result")
    assert "3 raters, 3 to the end" in said
    assert (tmp_path / "result.md").read_text() == said
    assert json.loads((tmp_path / "result.json").read_text())["raters"] == {"begun": 3, "finished": 3}
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"
    for arguments, why in (
        (("tally", out, "--out", tmp_path / "result"), "--force overwrites"),
        (("serve", tmp_path), "has no study.sqlite"),
        (("serve", out, "--port", "70000"), "port is 70000; expected 0 to 65535"),
        (("serve", out, "--host", "256.0.0.1"), "host is '256.0.0.1'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["study", *map(str, arguments)])
        assert why in capsys.readouterr().err


# Served, and through a browser


@contextlib.contextmanager
def served(path, port=0, end=signal.SIGINT):
    """A server's address; it is ended by a signal, kill -9 for one."""
    program = [sys.executable, "-m", "mmdiffusion", "study", "serve", str(path), "--port", str(port)]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + server.stderr.read()
        yield line.split("/ ")[0]
    finally:
        server.send_signal(end)
        try:
            out, err = server.communicate(timeout=30)
        finally:
            server.kill()
    assert server.returncode == (0 if end == signal.SIGINT else -end), err
    assert end != signal.SIGINT or "answers of" in out


def test_the_end_waits_for_nobody(study, monkeypatch, caplog, capsys):
    """Neither for an idle connection, nor the rest of a request, nor for who reads nothing; also where SIGINT was
    ignored, as a shell has it in what it starts in the background.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    reading, ended = threading.Event(), threading.Event()

    def endless(environ, start_response):
        start_response("200 OK", [])
        reading.set()
        return itertools.repeat(bytes(1 << 16))

    def connect_and_end():
        with contextlib.ExitStack() as connections:
            for sent in (b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n", b""):
                connections.enter_context(connected(address)).sendall(sent)
            reading.wait(30)
            os.kill(os.getpid(), signal.SIGINT)
            if not ended.wait(30):
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job, "make_app", lambda study: endless)
    before = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.default_int_handler}
    before = {x: signal.signal(x, handler) for x, handler in before.items()}
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            client = pool.submit(connect_and_end)
            said = job.serve(ServeStudy(study=study.path, port=address[1]))
            ended.set()
            client.result()
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)
    assert said.endswith("0 answers of 0 raters, of whom 0 came to the end")
    assert not [x.message for x in caplog.records if "still running" in x.message]


def connected(address, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def browser(tmp_path, monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(x) for x in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver: Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for x in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"):
        options.add_argument(x)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def until(driver, script, seconds=40):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := driver.execute_script(f"return {script}"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{script} did not come true in {seconds} s")


def pressed(driver, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def heading(driver):
    return until(driver, "document.readyState == 'complete' && document.activeElement.textContent")


def named(driver, role):
    """What a screen reader is told: the names of what has a role."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [x["name"]["value"] for x in nodes if x.get("role", {}).get("value") == role and not x["ignored"]]


def answered_by_keys(driver, digits):
    """Play, answer, and go on, by the keyboard alone."""
    from selenium.webdriver import Keys

    for _ in range(12):
        pressed(driver, Keys.TAB)
        if driver.execute_script("return document.activeElement.id == 'play'"):
            break
    pressed(driver, Keys.ENTER)
    until(driver, "document.getElementById('film').currentTime > 0")
    pressed(driver, Keys.TAB, *digits)
    assert driver.switch_to.active_element.text == "Next"
    pressed(driver, Keys.ENTER)


def test_round_trip_through_a_browser(study, browser, tmp_path):
    """By keys alone from beginning to end, over a reload and a server killed and started again; on a phone's screen."""
    from selenium.webdriver.common.by import By

    with served(study.path, end=signal.SIGKILL) as address:
        browser.get(address)
        assert heading(browser) == "A study of short films"
        browser.find_element(By.CSS_SELECTOR, "button").click()
        until(browser, "document.activeElement.textContent == 'Film 1 of 10'")
        assert [x for x in named(browser, "group") if x.endswith("?")] == [
            "How good is the picture?",
            "How good is the sound?",
            "How well do picture and sound fit?",
        ]
        assert named(browser, "radio")[:5] == ["1 bad", "2 poor", "3 fair", "4 good", "5 excellent"]
        assert named(browser, "heading") == ["Film 1 of 10"]
        assert named(browser, "progressbar") == ["0 of 10 films answered"]
        after = until(browser, "(x => x.readyState > 2 && x.src)(document.querySelectorAll('video')[1])")  # preloaded
        browser.find_element(By.CSS_SELECTOR, "input[name=video][value='4']").click()
        browser.find_element(By.CSS_SELECTOR, "button.main").click()  # the browser asks for the other answers
        assert not study.votes()
        answered_by_keys(browser, "435")
        until(browser, "document.activeElement.textContent == 'Film 2 of 10'")
        assert browser.execute_script("return document.getElementById('film').src") == after
        picture(browser, tmp_path, "screen", 900, 1120, False)
        picture(browser, tmp_path, "phone", 390, 1120, True)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        port = address.rsplit(":", 1)[1]
    with served(study.path, port):
        browser.refresh()
        assert heading(browser) == "Film 2 of 10"
        for number in range(2, 11):
            until(browser, f"document.activeElement.textContent == 'Film {number} of 10'")
            answered_by_keys(browser, "435" if number <= 6 else "1")
        until(browser, "document.activeElement.textContent == 'Thank you'")
        faults = [x["message"] for x in browser.get_log("browser") if "ERR_CONNECTION" not in x["message"]]
        assert not faults
    assert study.raters() == (1, 1)
    assert [x.value for x in study.votes()] == [4, 3, 5] * 6 + [1] * 4
    save_pictures(tmp_path)


def picture(driver, folder, name, width, height, is_phone):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(driver, "document.getElementById('film').readyState > 1")
    time.sleep(0.3)  # until it is painted
    driver.save_screenshot(str(folder / f"{name}.png"))


def save_pictures(folder):
    """Both beside one another, where STUDY_PICTURE says: that of docs/study.md."""
    from PIL import Image

    pictures = [Image.open(folder / f"{name}.png").convert("RGB") for name in ("screen", "phone")]
    assert all(len(numpy.unique(numpy.asarray(x).reshape(-1, 3), axis=0)) > 20 for x in pictures)  # neither is blank
    if target := os.environ.get("STUDY_PICTURE"):
        whole = Image.new("RGB", (sum(x.width for x in pictures) + 60, max(x.height for x in pictures) + 40), "#999")
        at = 20
        for x in pictures:
            whole.paste(x, (at, 20))
            at += x.width + 20
        whole.save(target, optimize=True)
