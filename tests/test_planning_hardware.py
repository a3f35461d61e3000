"""What machines are said to do, and how long their links take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scale_sae.errors import UserError
from scale_sae.planning import calibrate
from scale_sae.planning.hardware import DEVICES, GIB, Hardware, Link, find, from_json, ring, this_gpu, to_json

# Round numbers, so that what follows from them can be written out.
MACHINE = Hardware(
    name="made up",
    kind="cuda",
    memory=80 * GIB,
    runtime=GIB,
    reading=0,
    communicator=0,
    matrix={"float32": 1e12, "tf32": 8e12, "bfloat16": 16e12},
    bandwidth=1e11,
    gather=5e10,
    fresh=None,
    candidate=1e-9,
    overhead=0.0,
    intra=Link(1e10, 1e-6),
    inter=Link(1e9, 1e-5),
    at_once=None,
    sources=(),
)


# ---- hardware --------------------------------------------------------------------------------------------------------


def test_an_h200_does_what_was_measured_of_one() -> None:
    found = find("H200", {})
    assert found.matrix["bfloat16"] == pytest.approx(790e12, rel=0.01)  # TFLOP/s of an encoder's product
    assert found.bandwidth == pytest.approx(4.3e12, rel=0.01)  # bytes/s of Adam's pass
    for name, device in DEVICES.items():
        assert device.name == name and device.at_once is None and len(device.sources) == 4
        assert device.matrix["float32"] <= device.matrix["tf32"] < device.matrix["bfloat16"]
        assert device.inter.bandwidth < device.intra.bandwidth < device.bandwidth


def test_overrides_are_in_the_unit_of_their_name() -> None:
    keys = {"memory_gib": 96, "bfloat16_tflops": 700, "intra_gbps": 800, "inter_latency_us": 20, "at_once": 2}
    found = find("h100", keys)
    assert (found.memory, found.matrix["bfloat16"], found.at_once) == (96 * GIB, 700e12, 2)
    assert (found.intra.bandwidth, found.inter.latency) == (0.75 * 100e9, pytest.approx(20e-6))  # of nominal Gb/s
    assert found.matrix["float32"] == DEVICES["h100"].matrix["float32"]
    assert found.sources[-1] == "Given: at_once = 2."
    assert find("h100", {"intra_gbps": 3600, "inter_gbps": 400}).intra == DEVICES["h100"].intra  # what it is sold as
    said = find("h100", {"inter_gbps": 400})
    assert said.inter == DEVICES["h100"].inter and "75% are assumed" in said.sources[-1]
    assert find("h100", {"communicator_mib": 100}).communicator == 100 * 2**20


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GH200 480GB", None),  # neither an H200 nor linked like one
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H20", None),
    ],
)
def test_this_gpu_is_found_by_its_name(name: str, known: str | None) -> None:
    if known is None:
        with pytest.raises(UserError, match=f"{name}.*h100-pcie.*--calibrate") as error:
            this_gpu(name, 24 * GIB)
        assert "\n" not in str(error.value)
        return
    found = this_gpu(name, 123456789)
    assert replace(found, memory=DEVICES[known].memory, sources=DEVICES[known].sources) == DEVICES[known]
    assert found.memory == 123456789 and name in found.sources[-1] and known in found.sources[-1]


@pytest.mark.parametrize(
    ("device", "overrides", "words"),
    [
        ("h20", {}, ["--device", "'h20'", "h200", "--calibrate"]),
        ("cpu", {}, ["--device", "cpu", "--calibrate=cpu.json"]),
        ("h100", {"memory": 80}, ["--hardware.memory:", "80", "did you mean memory_gib"]),
        ("h100", {"inter_gbps": "fast"}, ["--hardware.inter_gbps", "'fast'", "number above 0"]),
        ("h100", {"inter_gbps": 0}, ["--hardware.inter_gbps", "0 is no number above 0"]),
        ("h100", {"at_once": True}, ["--hardware.at_once", "True"]),
    ],
)
def test_what_is_wrong_is_said_in_a_line(device: str, overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        find(device, overrides)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for machine in (
        MACHINE,
        replace(MACHINE, kind="cpu", communicator=3, fresh=1e9, at_once=2, sources=("Measured.",)),
    ):
        path.write_text(json.dumps(to_json(machine)))
        assert find(str(path), {}) == machine
    for text in ("no JSON", "[]", "{}", json.dumps({**to_json(MACHINE), "kind": "tpu"})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"machine\.json is no calibration .*; write one with accelerate launch"):
            find(str(path), {})
    with pytest.raises(ValueError, match="speed"):
        from_json({**to_json(MACHINE), "speed": 1})


# ---- links -----------------------------------------------------------------------------------------------------------


def sent_on_a_ring(op: str, numbers: int, ranks: int) -> tuple[int, float]:
    """(rounds, numbers that one rank sends) of a ring algorithm, by going round: each round every rank sends a part."""
    part, rounds, sent = numbers / ranks, 0, 0.0
    for phase in {"all_reduce": ("reduce", "gather"), "all_gather": ("gather",), "reduce_scatter": ("reduce",)}[op]:
        have = 1  # parts that are done on a rank, or summed over so many ranks
        while have < ranks:
            have, rounds, sent = have + 1, rounds + 1, sent + part
        assert phase and have == ranks
    return rounds, sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_ring_sends_what_it_is_charged_for(op: str, ranks: int) -> None:
    tensor = 840  # bytes
    rounds, sent = sent_on_a_ring(op, tensor, ranks)
    counted = 2 * tensor if op == "all_reduce" else tensor  # as `Flow` counts
    assert ring(op, ranks) == (rounds, pytest.approx(sent / counted))
    assert Link(100.0, 1.0).seconds(op, counted, ranks) == pytest.approx(rounds + sent / 100)


def test_the_link_behind_times_is_found() -> None:
    truth = Link(3e9, 2e-4)
    sizes = [("all_reduce", 2 * n) for n in (2**12, 2**16, 2**23)] + [("send", 2**12), ("all_gather", 2**20)]
    times = [(op, size, truth.seconds(op, size, 4)) for op, size in sizes]
    found = calibrate.fit(times, 4)
    # The condition of the problem times the rounding of float64.
    assert (found.bandwidth, found.latency) == (pytest.approx(3e9, rel=1e-6), pytest.approx(2e-4, rel=1e-6))
    # Noise that no latency explains, or no bandwidth: the other explains it all, and both stay positive.
    for odd in ([("send", 1000, 1.0), ("send", 10**6, 0.5)], [("send", 1000, 1e-9), ("send", 10**6, 1.0)]):
        link = calibrate.fit(odd, 2)
        assert link.bandwidth > 0 and link.latency > 0
