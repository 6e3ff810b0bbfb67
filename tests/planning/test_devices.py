"""Which card a name is, and how much of one a plan counts on."""

from __future__ import annotations

import os

import pytest
import torch

from llama_pro_fast.host import available_memory
from llama_pro_fast.planning import devices
from llama_pro_fast.planning.devices import DEVICES, GIB, _same, cpu, present


def known_as(name: str) -> list[str]:
    return [key for key, device in DEVICES.items() if _same(device, name)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_a_card_is_known_by_the_name_pytorch_gives_it(name, key):
    assert known_as(name) == [key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",  # another chip, half as fast, 16 GB
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 PCIe",  # three quarters of the clock, HBM2e
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A10G",
        "NVIDIA H20",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4080",
        "Tesla V100-SXM2-32GB",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_another_card_is_none_of_them(name):
    assert known_as(name) == []


def test_a_plan_leaves_room_on_a_card():
    """For the context, and for what the allocator holds and cannot use."""
    for device in DEVICES.values():
        assert device.usable < device.memory - GIB
        assert device.usable > 0.9 * device.memory - GIB
        assert not device.is_cpu


def test_the_cards_hold_less_than_their_names_say_and_stand_largest_first():
    for device in DEVICES.values():
        gigabytes = int(device.title.split()[-2])
        assert 0.9 * gigabytes * GIB < device.memory <= gigabytes * GIB, device.title
    memories = [device.memory for device in DEVICES.values()]
    assert memories == sorted(memories, reverse=True)


def test_of_the_cpu_a_plan_uses_nine_tenths_of_what_is_free(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 10 * GIB)
    device = cpu()
    assert device.is_cpu
    assert device.usable == device.memory == 9 * GIB


def test_without_a_gpu_this_machine_is_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert present().is_cpu


@pytest.mark.parametrize(("name", "known"), [("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA GeForce RTX 4090", "4090")])
def test_a_present_card_has_its_own_speed_and_what_is_free_of_it(name, known, monkeypatch):
    free = 20 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 24 * GIB))
    device = present()
    assert device.title == name
    assert (device.flops, device.bandwidth) == (DEVICES[known].flops, DEVICES[known].bandwidth)
    assert 0.92 * free < device.usable < free - 0.5 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path, version):
    """What is used of it is off, and pages of files that nobody looked at lately are not used."""
    folder, names = {
        2: (tmp_path, ("memory.max", "memory.current", "inactive_file")),
        1: (tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    }[version]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text("1000000\n")
    (folder / names[1]).write_text("300000\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} 100000\n")
    assert available_memory(tmp_path) == 800_000


def test_no_limit_is_none(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 2**20
    assert available_memory(tmp_path / "nothing") > 2**20


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_what_the_user_told_the_allocator_stands(monkeypatch, told, left):
    monkeypatch.setattr(os, "environ", dict(told))
    devices.expandable_segments()
    assert os.environ == left
