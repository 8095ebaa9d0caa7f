"""What a run leaves, read."""

import json

import torch


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def metrics(folder, group="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


def assert_same_student(a, b):
    one, two = load(a / "student.pth")["state_dict"], load(b / "student.pth")["state_dict"]
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
