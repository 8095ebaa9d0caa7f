"""Features come in the order of the images, and are found again only for exactly what they were made from."""

import json
import os
import signal
import socket
import time
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import search.features
import search.rowfile
from runtime.device import Process
from runtime.errors import UserError
from search.features import Keep, extract, left_out

ALONE = Process(0, 1, torch.device("cpu"))


class Doubler(nn.Module):
    """Image of value v -> features [v, 2v]; refuses training mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append(len(images))
        return torch.stack([images, 2 * images], dim=1).double()


def loader_of(values, batch=4):
    def make(indices):
        for start in range(0, len(indices), batch):
            chosen = list(indices)[start:start + batch]
            yield (torch.tensor([values[i] for i in chosen]),), torch.tensor(chosen), []
    return make


def nothing(batch):
    return None


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("training", [True, False])
def test_rows_are_in_order_and_the_mode_is_put_back(count, training):
    encoder = Doubler().train(training)
    values = [float((7 * i) % 11) for i in range(count)]
    checked = []
    features = extract(encoder, loader_of(values), count, ALONE, "x", checked.append)
    assert features.dtype == torch.float32
    assert features.tolist() == [[v, 2 * v] for v in values]
    assert encoder.training is training
    assert len(checked) == len(encoder.seen) == -(-count // 4)
    assert not features.requires_grad


def test_check_comes_before_use():
    encoder = Doubler()

    def refuse(batch):
        raise UserError("bad image")

    with pytest.raises(UserError, match="bad image"):
        extract(encoder, loader_of([1.0]), 1, ALONE, "x", refuse)
    assert encoder.seen == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(bad):
    values = [1.0, 2.0, 3.0, bad, 5.0, bad]
    with pytest.raises(UserError) as caught:
        extract(Doubler(), loader_of(values), 6, ALONE, "test features", nothing)
    assert "test features" in str(caught.value)
    assert "2 images" in str(caught.value)
    assert "image 3 " in str(caught.value)


IDENTITY = {"sha256": "ab", "data": "cd", "transform": "resize 33", "image_size": 32}


def kept(folder, values, encoder=None, identity=IDENTITY, dtype="float32", batch=4, check=nothing):
    return extract(encoder or Doubler(), loader_of(values, batch), len(values), ALONE, "x", check,
                   Keep(folder, identity, 2, dtype))


def test_features_are_found_again_for_exactly_what_they_were_made_from(tmp_path):
    folder = tmp_path / "features"
    encoder = Doubler()
    first = kept(folder, [1.0] * 5, encoder)
    assert first.tolist() == [[1.0, 2.0]] * 5
    made = len(encoder.seen)
    assert kept(folder, [3.0] * 5, encoder, dict(reversed(IDENTITY.items()))).tolist() == first.tolist()
    assert len(encoder.seen) == made
    for key in IDENTITY:
        assert kept(folder, [3.0] * 5, encoder, {**IDENTITY, key: "other"})[0, 0] == 3
    assert kept(folder, [3.0] * 5, encoder, dtype="float16")[0, 0] == 3
    assert len(encoder.seen) == made * (2 + len(IDENTITY))
    assert kept(folder, [4.0] * 5)[0, 0] == 1  # the first is still there
    assert len(list(folder.iterdir())) == 2 * (2 + len(IDENTITY)), "something half made is left"
    twins = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert {**IDENTITY, "checksums": [[0, 5, zlib.crc32(first.numpy().tobytes())]]} in twins
    assert {np.load(path, allow_pickle=False).dtype.str for path in folder.glob("*.npy")} == {"<f4", "<f2"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_kept_in_the_type_asked_for(dtype, tmp_path):
    values = [0.1, 1.0, 3.14159]
    for _ in range(2):
        found = kept(tmp_path, values, dtype=dtype)
        wanted = torch.tensor([[v, 2 * v] for v in values]).to(getattr(torch, dtype))
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What is on the disk is not made again, also by another number of processes."""
    monkeypatch.setattr(search.features, "WRITTEN", 1)  # every batch at once
    values = [float(i) for i in range(20)]

    class Killed(BaseException):
        pass

    def dies(batch):
        if 9 in batch[1]:
            raise Killed

    encoder = Doubler()
    with pytest.raises(Killed):
        kept(tmp_path, values, encoder, check=dies)
    assert sum(encoder.seen) == 8
    assert not list(tmp_path.glob("*.npy"))
    assert kept(tmp_path, values, encoder).tolist() == [[v, 2 * v] for v in values]
    assert sum(encoder.seen) == 20
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("bad", "dtype", "words"), [
    (float("nan"), "float32", ["image 5 ", "not finite"]), (7e4, "float16", ["image 5 ", "float16", "bfloat16"])])
def test_numbers_that_cannot_be_kept_are_named(bad, dtype, words, tmp_path):
    with pytest.raises(UserError) as caught:
        kept(tmp_path, [1.0] * 5 + [bad, 1.0], dtype=dtype)
    assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.glob("*.npy"))


def test_of_two_jobs_that_want_the_same_features_one_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search.rowfile, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(search.features, "WRITTEN", 1)
    values, (read, write) = [float(i) for i in range(20)], os.pipe()

    def slowly(_):
        os.write(write, b"x")
        time.sleep(0.1)

    other = os.fork()
    if not other:
        kept(tmp_path, values, check=slowly)
        os._exit(0)
    assert os.read(read, 1) == b"x"
    encoder = Doubler()
    found = kept(tmp_path, values, encoder)
    assert os.waitpid(other, 0)[1] == 0
    assert found.tolist() == [[v, 2 * v] for v in values]
    assert encoder.seen == []
    said, = capsys.readouterr().out.splitlines()
    assert f"being written by process {other} on {socket.gethostname()} since" in said
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]


def test_the_work_of_a_job_that_is_killed_is_gone_on_with_by_the_one_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(search.rowfile, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(search.features, "WRITTEN", 1)
    values = [float(i) for i in range(20)]

    def dies(batch):
        if 9 in batch[1]:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)

    other = os.fork()
    if not other:
        kept(tmp_path, values, check=dies)
        os._exit(0)
    while not list(tmp_path.glob("*.partial/done-0.txt")):
        time.sleep(0.01)
    encoder = Doubler()
    assert kept(tmp_path, values, encoder).tolist() == [[v, 2 * v] for v in values]
    assert os.WTERMSIG(os.waitpid(other, 0)[1]) == signal.SIGKILL
    assert sum(encoder.seen) == 12


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_images_that_could_not_be_opened_are_left_out_after_a_kill_and_from_kept_features_too(dtype, tmp_path,
                                                                                              monkeypatch):
    monkeypatch.setattr(search.features, "WRITTEN", 1)
    keep = dtype and Keep(tmp_path, IDENTITY, 2, dtype)

    def loader(indices):
        for views, chosen, _ in loader_of([float(i) for i in range(12)])(indices):
            yield views, chosen, [(i, "broken") for i in (2, 9) if i in chosen] + [(40, "as a replacement")]

    def dies(batch):
        if 8 in batch[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(Doubler(), loader, 12, ALONE, "x", dies, keep, leave_out=True)
    for _ in range(2):
        found = extract(Doubler(), loader, 12, ALONE, "x", nothing, keep, leave_out=True)
        assert left_out(found).tolist() == [2, 9]
        assert found[[1, 3]].tolist() == [[1, 2], [3, 6]]
    with pytest.raises(UserError, match="image 1"):
        extract(Doubler(), loader_of([1.0, float("-inf") * 0]), 2, ALONE, "x", nothing, leave_out=True)


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extract(Doubler(), loader_of([1.0]), 1, ALONE, "x", nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_changed_numbers_are_found_said_and_made_again(dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search.features, "WRITTEN", 1)  # a block is a batch
    values = [float(i) for i in range(20)]
    kept(tmp_path, values, dtype=dtype)
    rows, = tmp_path.glob("*.npy")
    good = rows.read_bytes()
    for place in (128, 128 + 41, len(good) - 1):
        rows.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        assert kept(tmp_path, values, dtype=dtype).tolist() == [[v, 2 * v] for v in values]
        assert rows.read_bytes() == good
        assert f"{rows} is damaged (rows " in capsys.readouterr().out
    encoder = Doubler()
    kept(tmp_path, values, encoder, dtype=dtype)
    assert (encoder.seen, capsys.readouterr().out) == ([], "")


@pytest.mark.parametrize(("before", "after"), [(b"False", b"True "), (b"(20,", b"(10,"), (b", 2)", b", 4)"),
                                               (b"<f4", b">f4")])
def test_a_changed_header_is_found(before, after, tmp_path):
    values = [float(i) for i in range(20)]
    kept(tmp_path, values)
    rows, = tmp_path.glob("*.npy")
    good = rows.read_bytes()
    rows.write_bytes(good.replace(before, after))
    assert kept(tmp_path, values).tolist() == [[v, 2 * v] for v in values]
    assert rows.read_bytes() == good


def test_rows_that_were_changed_between_a_kill_and_the_next_run_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(search.features, "WRITTEN", 1)
    values = [float(i) for i in range(20)]

    def dies(batch):
        if 9 in batch[1]:
            raise KeyboardInterrupt

    encoder = Doubler()
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, values, encoder, check=dies)
    rows, = tmp_path.glob("*.partial/rows.npy")
    content = bytearray(rows.read_bytes())
    content[128 + 5 * 8] ^= 1  # of image 5
    rows.write_bytes(content)
    made = sum(encoder.seen)
    assert kept(tmp_path, values, encoder).tolist() == [[v, 2 * v] for v in values]
    assert sum(encoder.seen) == made + 12 + 4  # the twelve that were missing, and the batch of image 5


@pytest.mark.parametrize("harm", ["no record", "cut short", "other record"])
def test_half_a_file_is_not_used(harm, tmp_path):
    kept(tmp_path, [0.0] * 3)
    rows, = tmp_path.glob("*.npy")
    if harm == "no record":
        rows.with_suffix(".json").unlink()
    elif harm == "cut short":
        rows.write_bytes(rows.read_bytes()[:-4])
    else:
        rows.with_suffix(".json").write_text("{}")
    assert kept(tmp_path, [1.0] * 3).tolist() == [[1.0, 2.0]] * 3
    assert kept(tmp_path, [2.0] * 3).tolist() == [[1.0, 2.0]] * 3
