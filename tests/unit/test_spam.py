"""The spam workload: on e-mails that the test writes, and on the corpus where the cache holds it."""

from email import message_from_bytes
from email.message import EmailMessage

import numpy as np
import pytest

from noria.records import Window, moment
from noria.settings import load_settings
from noria.source import convert
from workloads.spam import LONGEST, MAILS, WORKLOAD, parse, read_folder, received

ALL = Window(moment("1990-01-01"), moment("2100-01-01"))


def _mail(body=b"Hello there", **headers):
    lines = [f"{name.replace('_', '-')}: {value}".encode("latin-1") for name, value in headers.items()]
    return b"\n".join(lines) + b"\n\n" + body


def test_a_plain_mail():
    found = parse(_mail(Subject="Lunch?", From="Ann <ann@Example.org>"))
    assert found == {"subject": "Lunch?", "body": "Hello there", "sender_domain": "example.org"}


def test_html_loses_its_markup():
    body = b"<html><head><style>p {color: red}</style><title>t</title></head><p>V<!-- x -->iagra &amp; more</p><br>now"
    assert parse(_mail(body, Content_Type="text/html"))["body"] == "Viagra & more now"


def test_the_plain_part_is_preferred():
    mail = EmailMessage()
    mail["Subject"] = "both"
    mail.set_content("plain words")
    mail.add_alternative("<p>marked up words</p>", subtype="html")
    assert parse(mail.as_bytes())["body"] == "plain words"


def test_charsets_and_encoded_headers():
    body = "Grüße".encode("latin-1")
    assert parse(_mail(body, Content_Type="text/plain; charset=iso-8859-1"))["body"] == "Grüße"
    assert parse(_mail(body, Content_Type="text/plain; charset=no-such-thing"))["body"] == "Grüße"
    assert parse(_mail(Subject="=?iso-8859-1?Q?Gr=FC=DFe?="))["subject"] == "Grüße"
    assert parse(_mail(Subject="=?no-such?Q?a?="))["subject"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n\n",
        b"\x00\xff\xfe" * 50,
        b"Content-Type: multipart/mixed; boundary=x\n\n--x\nbroken",
        b"Content-Transfer-Encoding: base64\n\n!!!not base64!!!",
        b"Subject: \xff\xfe\n\nbody",
        b"Content-Type: text/html\n\n" + b"<" * 50_000,
        b"Content-Type: text/html\n\n" + b"<script>" * 5_000,
        b"Date: nonsense\nReceived: ; ;;\n\nx",
    ],
)
def test_nothing_breaks_it(raw):
    found = parse(raw)
    assert all(isinstance(value, str) and len(value) <= LONGEST for value in found.values())
    assert received(message_from_bytes(raw)) is None
    WORKLOAD.schema.parse([found])


def test_what_lists_and_collectors_add_is_cut():
    body = (
        b"URL: http://feed.example/1\nDate: Not supplied\nReal words\nsend to zzzz@spamassassin.taint.org now\n"
        b"_______________________________________________\nExmh-users mailing list\nhttps://listman.redhat.com/mailman/listinfo/exmh\n"
    )
    found = parse(_mail(body, Subject="Re: [Exmh] [list] Window"))
    assert found["subject"] == "Re: Window"
    assert found["body"] == "Real words send to now"


def test_the_newest_hop_says_when():
    mail = _mail(
        Received="from a by b; Thu, 22 Aug 2002 07:36:16 -0400",
        Date="Tue, 01 Jan 2030 00:00:00 +0000",
    )
    assert received(message_from_bytes(mail)) == moment("2002-08-22T11:36:16")
    assert received(message_from_bytes(_mail(Date="Thu, 22 Aug 2002 07:36:16 -0400"))) == moment("2002-08-22T11:36:16")


def test_a_folder_becomes_records(tmp_path, monkeypatch):
    for folder, day in (("spam-1", 1), ("easy-ham-1", 2), ("hard-ham-1", 3)):
        (tmp_path / folder).mkdir()
        date = f"Thu, 0{day} Aug 2002 07:36:16 +0000"
        (tmp_path / folder / "1.txt").write_bytes(_mail(Subject=folder, Date=date, From="a@aol.com"))
    (tmp_path / "spam-1" / "2.txt").write_bytes(_mail(Subject="no date"))
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path))
    convert(tmp_path / MAILS, lambda: read_folder(tmp_path), "date")
    rows = WORKLOAD.records(ALL)
    assert rows.column("is_spam").to_pylist() == [1.0, 0.0, 0.0]
    assert len(WORKLOAD.records(Window(moment("2002-08-01"), moment("2002-08-02")))) == 1


def test_the_sender_is_for_slices_only():
    assert [column.name for column in WORKLOAD.schema.columns if column.feature] == ["subject", "body"]


def test_bands():
    assert WORKLOAD.bands.actions(np.array([0.95, 0.9, 0.6, 0.5, 0.1])) == [
        "spam",
        "review",
        "review",
        "inbox",
        "inbox",
    ]


@pytest.fixture(scope="module")
def corpus():
    """All e-mails, where the cache holds them."""
    path = load_settings().downloads / MAILS
    if not path.is_file():
        pytest.skip(f"{path} is not there; `noria check workloads.spam:WORKLOAD` downloads it")
    return WORKLOAD.records(ALL)


def test_the_corpus_is_whole(corpus):
    assert len(corpus) == 6046
    assert corpus.column("is_spam").to_numpy().sum() == 1896
    years = {date.year for date in corpus.column("date").to_pylist()}
    assert years == {2001, 2002}


def test_nothing_of_the_collectors_is_left(corpus):
    texts = corpus.column("body").to_pylist() + corpus.column("subject").to_pylist()
    for mark in ("taint.org", "netnoteinc", "listinfo", "sf.net"):
        assert not any(mark in (text or "") for text in texts), mark


def test_slices_cover_every_row_once(corpus):
    masks = WORKLOAD.slices(corpus.select(list(WORKLOAD.schema.names)))
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    assert all(mask.sum() > 500 for mask in masks.values())
