"""What a machine can do: the figures that estimates of time and memory start from.

``DEVICES`` holds GPUs by their data sheets, ``scale_sae.plan --calibrate`` measures the machine that it runs on.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scale_sae.errors import UserError, nearest

GIB = 2**30

# What of a data sheet's figure a program gets, one number for each kind of figure.
# Of the tensor cores' rate, in products as large as an encoder's: 790 of an H200's 989 TFLOP/s were measured.
PRODUCT_SHARE = 0.8
# Of the memory's bandwidth, in passes over large tensors: 4.3 of an H200's 4.8 TB/s were measured.
PASS_SHARE = 0.9
# Of a link's bandwidth, in collectives: on A100s, whose NVLink sends 300 GB/s, NVIDIA's nccl-tests report a "bus
# bandwidth" of 200 to 230 (github.com/NVIDIA/nccl-tests, issues 149 and 178).
LINK_SHARE = 0.75
# Moved for one candidate of a selection: some hundred passes over int64 indices and values, counted in selection.py.
CANDIDATE_BYTES = 1000
# Bytes that each communicator of NCCL takes on a GPU: 544 to 688 MB on A100s (github.com/NVIDIA/nccl, issue 964).
COMMUNICATOR = GIB // 2


def ring(op: str, ranks: int) -> tuple[int, float]:
    """What a call costs on a ring of ``ranks``: messages one after the other, and the share of ``bytes`` in them.

    ``bytes`` as `flow.Flow` counts them: an all-reduce is a reduce-scatter and an all-gather of its tensor, and each of
    these sends ranks - 1 parts of it (Patarasu & Yuan 2009, "Bandwidth optimal all-reduce algorithms").
    """
    if op in ("send", "recv"):
        return 1, 1.0
    return (ranks - 1) * (2 if op == "all_reduce" else 1), (ranks - 1) / ranks


@dataclass(frozen=True)
class Link:
    """What connects ranks. ``bandwidth``: bytes/s that one rank can send; ``latency``: seconds that a message takes."""

    bandwidth: float
    latency: float

    def seconds(self, op: str, bytes: float, ranks: int) -> float:
        """Of one call, as `ring` counts it."""
        messages, share = ring(op, ranks)
        return messages * self.latency + share * bytes / self.bandwidth


@dataclass(frozen=True)
class Hardware:
    """A kind of device, and the links between ranks that have one each.

    Attributes:
        name: of the device.
        kind: "cuda" or "cpu".
        memory: bytes of a GPU, or of a node where ranks are CPU processes.
        runtime: bytes that a process takes of it before its first tensor.
        reading: bytes that a process takes beside for reading text: libraries, tokenizer, documents. On GPUs 0.
        communicator: bytes that each communicator of NCCL takes of a GPU; 0 on CPUs.
        matrix: name of a dtype, or "tf32" → FLOP/s that large matrix products reach.
        bandwidth: bytes/s of passes over more memory than the caches hold, read + written.
        gather: bytes/s of rows that are read by their numbers and summed.
        fresh: bytes/s at which new memory for large tensors is first written; None: what was freed is kept for them.
        candidate: seconds for each entry that a selection looks at again after its pass over all of them.
        overhead: seconds that the host needs to call an operation.
        intra: between ranks of a node.
        inter: between ranks of different nodes, all ranks of a node sending at once.
        at_once: ranks of a node that can compute at full speed at once; None: all, each has a device of its own.
        sources: where the figures are from, a sentence each.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int
    runtime: int
    reading: int
    communicator: int
    matrix: Mapping[str, float]
    bandwidth: float
    gather: float
    fresh: float | None
    candidate: float
    overhead: float
    intra: Link
    inter: Link
    at_once: int | None
    sources: tuple[str, ...]


def communicator_source() -> str:
    """Where ``COMMUNICATOR`` is from, for `Hardware.sources`."""
    return (
        f"Assumed: {COMMUNICATOR // 2**20} MiB for each communicator of NCCL (--hardware.communicator_mib); on A100s "
        "they took 544 to 688 MB (github.com/NVIDIA/nccl, issue 964)."
    )


def _gpu(
    name: str,
    memory_gib: float,
    tflops: tuple[float, float, float, float],
    terabytes: float,
    intra_gbytes: float,
    inter_gbps: float,
    sheet: str,
) -> Hardware:
    """A GPU by its data sheet.

    Args:
        name: in ``DEVICES``.
        memory_gib: what torch reports as its total capacity, rounded down.
        tflops: dense peaks of products in float64, float32 (no tensor cores), TF32 and bfloat16 = float16.
        terabytes: per second, of the memory.
        intra_gbytes: per second and direction, of NVLink or PCIe.
        inter_gbps: gigabits per second and direction of the network, for each GPU of a node.
        sheet: the data sheet, and what connects the GPUs.
    """
    double, single, tf32, half = (PRODUCT_SHARE * 1e12 * peak for peak in tflops)
    bandwidth = PASS_SHARE * 1e12 * terabytes
    return Hardware(
        name=name,
        kind="cuda",
        memory=int(memory_gib * GIB),
        runtime=int(1.5 * GIB),
        reading=0,
        communicator=COMMUNICATOR,
        matrix={"float64": double, "float32": single, "tf32": tf32, "bfloat16": half, "float16": half},
        bandwidth=bandwidth,
        gather=bandwidth,
        fresh=None,
        candidate=CANDIDATE_BYTES / bandwidth,
        overhead=6e-6,
        intra=Link(LINK_SHARE * 1e9 * intra_gbytes, 3e-6),
        inter=Link(LINK_SHARE * 1e9 * inter_gbps / 8, 6e-6),
        at_once=None,
        sources=(
            f"Peaks: {sheet}.",
            f"Assumed of them: {PRODUCT_SHARE:.0%} in products, {PASS_SHARE:.0%} in passes over memory (both as "
            f"measured on an H200), {LINK_SHARE:.0%} on links.",
            f"Assumed: a network of {inter_gbps:g} Gb/s for each GPU (--hardware.inter_gbps), messages of 3 us in a "
            "node and 6 us between nodes, 6 us for an operation, 1.5 GiB for CUDA.",
            communicator_source(),
        ),
    )


_HOPPER = (67.0, 67.0, 495.0, 989.0)  # TFLOP/s of the SXM boards
_AMPERE = (19.5, 19.5, 156.0, 312.0)
DEVICES: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("b200", 178, (40, 80, 1100, 2250), 8.0, 900, 400, "NVIDIA HGX B200, NVLink 5 of 900 GB/s each way"),
        _gpu("h200", 139, _HOPPER, 4.8, 450, 400, "NVIDIA H200 SXM, NVLink 4 of 450 GB/s each way"),
        _gpu("h100", 79, _HOPPER, 3.35, 450, 400, "NVIDIA H100 SXM, NVLink 4 of 450 GB/s each way"),
        _gpu("h100-pcie", 79, (51, 51, 378, 756), 2.0, 64, 200, "NVIDIA H100 PCIe, PCIe 5 of 64 GB/s each way"),
        _gpu("a100", 79, _AMPERE, 2.039, 300, 200, "NVIDIA A100 80GB SXM, NVLink 3 of 300 GB/s each way"),
        _gpu("a100-40gb", 39, _AMPERE, 1.555, 300, 200, "NVIDIA A100 40GB SXM, NVLink 3 of 300 GB/s each way"),
        _gpu("l40s", 44, (1.4, 91.6, 183, 362), 0.864, 32, 100, "NVIDIA L40S, PCIe 4 of 32 GB/s each way"),
        _gpu("rtx4090", 23.6, (1.3, 82.6, 82.6, 165), 1.008, 32, 25, "NVIDIA RTX 4090, PCIe 4 of 32 GB/s each way"),
    )
}


# ---- a device by its name, with changes ------------------------------------------------------------------------------


def _link(field: str, part: str, factor: float) -> Callable[[Hardware, float], Hardware]:
    def change(hardware: Hardware, value: float) -> Hardware:
        link = replace(getattr(hardware, field), **{part: value * factor})
        return replace(hardware, **{field: link})  # type: ignore[arg-type]

    return change


def _rate(dtype: str) -> Callable[[Hardware, float], Hardware]:
    return lambda hardware, value: replace(hardware, matrix={**hardware.matrix, dtype: value * 1e12})


# What may stand behind ``--hardware.``: the figure in the unit of its name, as it is reached and not a peak. But
# ``_gbps`` is what a network or NVLink is sold as, of which `LINK_SHARE` is reached.
CHANGES: dict[str, Callable[[Hardware, float], Hardware]] = {
    "memory_gib": lambda hardware, value: replace(hardware, memory=int(value * GIB)),
    "runtime_gib": lambda hardware, value: replace(hardware, runtime=int(value * GIB)),
    "reading_gib": lambda hardware, value: replace(hardware, reading=int(value * GIB)),
    "communicator_mib": lambda hardware, value: replace(hardware, communicator=int(value * 2**20)),
    **{f"{dtype}_tflops": _rate(dtype) for dtype in ("float64", "float32", "tf32", "bfloat16", "float16")},
    "bandwidth_gbytes": lambda hardware, value: replace(hardware, bandwidth=value * 1e9),
    "gather_gbytes": lambda hardware, value: replace(hardware, gather=value * 1e9),
    "candidate_ns": lambda hardware, value: replace(hardware, candidate=value * 1e-9),
    "overhead_us": lambda hardware, value: replace(hardware, overhead=value * 1e-6),
    "intra_gbps": _link("intra", "bandwidth", LINK_SHARE * 1e9 / 8),
    "intra_latency_us": _link("intra", "latency", 1e-6),
    "inter_gbps": _link("inter", "bandwidth", LINK_SHARE * 1e9 / 8),
    "inter_latency_us": _link("inter", "latency", 1e-6),
    "at_once": lambda hardware, value: replace(hardware, at_once=max(1, int(value))),
}


def find(device: str, overrides: Mapping[str, object]) -> Hardware:
    """The hardware called ``device``: one of ``DEVICES``, or that in a file which ``--calibrate`` wrote.

    Args:
        device: the name, or the file's path.
        overrides: keys of ``CHANGES`` → numbers.

    Raises:
        UserError: there is none, or a key or number is wrong.
    """
    hardware = DEVICES.get(device.lower())
    if hardware is None:
        hardware = _read(device)
    return changed(hardware, overrides)


def changed(hardware: Hardware, overrides: Mapping[str, object]) -> Hardware:
    """``hardware`` with figures of one's own: keys of ``CHANGES`` → numbers. ``UserError`` where one is wrong."""
    for key, value in overrides.items():
        if key not in CHANGES:
            raise UserError(
                f"--hardware.{key}: unknown key, set to {value}{nearest(key, CHANGES)}; there are {', '.join(CHANGES)}"
            )
        # bool is an int, and "0" would divide by zero.
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"--hardware.{key}: {value!r} is no number above 0")
        assumed = f", of which {LINK_SHARE:.0%} are assumed to be reached" if key.endswith("_gbps") else ""
        said = f"Given: {key} = {value}{assumed}."
        hardware = replace(CHANGES[key](hardware, value), sources=(*hardware.sources, said))
    return hardware


def this_gpu(name: str, memory: int) -> Hardware:
    """The entry of ``DEVICES`` for a GPU of this machine, with its own memory.

    Args:
        name: as ``torch.cuda.get_device_name`` gives it, like "NVIDIA A100-SXM4-40GB".
        memory: its bytes.

    Raises:
        UserError: there is none.
    """
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    found = [known for known in DEVICES if all(_says(text, part) for part in known.split("-"))]
    if not found:
        raise UserError(
            f"--device: {name!r}, the GPU of this machine, is not in the table; name what comes next to it, of "
            f"{', '.join(DEVICES)}, or measure it with accelerate launch -m scale_sae.plan --calibrate=machine.json"
        )
    known = max(found, key=len)
    said = f"This machine: {name}, taken for {known}, with {memory / GIB:.1f} GiB."
    return replace(DEVICES[known], memory=memory, sources=(*DEVICES[known].sources, said))


def _says(text: str, part: str) -> bool:
    """Whether words hold ``part``, spaces aside: "rtx 4090" holds rtx4090, but "gh200" no h200, and "a1000" no a100."""
    return re.search(r"(?<![a-z0-9])" + " ?".join(part) + r"(?![0-9])", text) is not None


def _read(device: str) -> Hardware:
    path = Path(device)
    if path.is_file():
        try:
            return from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--device: {device} is no calibration ({type(error).__name__}: {error}); write one with "
                f"accelerate launch -m scale_sae.plan --calibrate={device}"
            ) from None
    if device == "cpu":
        raise UserError(
            "--device: cpu is no figure by itself, since CPUs differ; measure yours with accelerate launch "
            "--num_processes N -m scale_sae.plan --calibrate=cpu.json, then --device=cpu.json"
        )
    raise UserError(
        f"--device: {device!r} is neither a known device nor a file{nearest(device, DEVICES)}; take one of "
        f"{', '.join(DEVICES)}, or the file that --calibrate wrote"
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def to_json(hardware: Hardware) -> dict[str, Any]:
    """What ``from_json`` reads, JSON-able."""
    return dataclasses.asdict(hardware)


def from_json(found: Mapping[str, Any]) -> Hardware:
    """The hardware that ``to_json`` wrote. ``KeyError``, ``TypeError`` or ``ValueError`` where it is something else."""
    values = {field.name: found[field.name] for field in dataclasses.fields(Hardware)}
    if unknown := found.keys() - values.keys():
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
    if values["kind"] not in ("cuda", "cpu"):
        raise ValueError(f"kind {values['kind']!r} is neither cuda nor cpu")
    intra, inter = (
        Link(float(values[name]["bandwidth"]), float(values[name]["latency"])) for name in ("intra", "inter")
    )
    at_once, fresh = values["at_once"], values["fresh"]
    return Hardware(
        name=str(values["name"]),
        kind=values["kind"],
        memory=int(values["memory"]),
        runtime=int(values["runtime"]),
        reading=int(values["reading"]),
        communicator=int(values["communicator"]),
        matrix={str(dtype): float(rate) for dtype, rate in values["matrix"].items()},
        bandwidth=float(values["bandwidth"]),
        gather=float(values["gather"]),
        fresh=None if fresh is None else float(fresh),
        candidate=float(values["candidate"]),
        overhead=float(values["overhead"]),
        intra=intra,
        inter=inter,
        at_once=None if at_once is None else int(at_once),
        sources=tuple(map(str, values["sources"])),
    )
