"""Bundles that a stranger might send: each mutation takes a sound bundle and a seed, and returns what is to be loaded.

Outside of the bundle lie files that must not be touched (`SECRETS`, beside it and one folder up). Mutations point at them by every kind of
name and link there is. Half of them put the digests right again, so that what they changed is reached by what comes after the digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx

SECRET = "secret.bin"
VALUES = [
    None, True, False, 0, -1, 1, 2, 64, 1 << 20, 1 << 31, (1 << 48) - 1, 1 << 63, 1 << 70, 0.5, -1e308, "", "x", "fp32", "bf16", "int8",
    "default", "float32", "float64", "string", "bfloat16", "O", "onnxruntime:CPU", "openvino:CPU", "openvino:AUTO", "openvino:GPU.0",
    "null:CPU",
    ":", "os:system", "../" + SECRET, "\0", "é" * 300, [], {}, [1], [2, 16], [None, 16], [1 << 40, 1 << 40], {"x": 1}, [[[]]],
]  # fmt: skip
SETTINGS = [
    "intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level", "session.intra_op.allow_spinning",
    "session.intra_op_thread_affinities", "session.model_external_initializers_file_folder_path", "session.load_model_format",
    "ep.context_file_path", "profile_file_prefix", "optimized_model_filepath", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "PERFORMANCE_HINT",
    "CACHE_DIR", "WEIGHTS_PATH", "INFERENCE_PRECISION_HINT", "ENABLE_CPU_PINNING", "provider.x", "",
]  # fmt: skip


def names_outside(bundle: Path) -> list[str]:
    """Return ways to write the name of a secret, from the bundle's folder or from a folder in it."""
    beside = bundle.parent / SECRET
    return [
        f"../{SECRET}", f"../../{SECRET}", f"segments/../../{SECRET}", str(beside), f"//{str(beside).lstrip('/')}", f"..\\{SECRET}",
        f"file://{beside}", f"./../{SECRET}", f"segments/../../../{SECRET}\0", f"~/{SECRET}", f"*/{beside}", f"/proc/self/cwd/{SECRET}",
    ]  # fmt: skip


def read_plan(bundle: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((bundle / "plan.json").read_text())
    return plan


def write_plan(bundle: Path, plan: dict[str, Any], *, digests: bool = True) -> None:
    """Write a plan, with the digests of what is there."""
    files = plan.get("files")
    if digests and isinstance(files, dict):
        for name in files:
            try:
                files[name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
            except (OSError, ValueError):
                continue
    (bundle / "plan.json").write_text(json.dumps(plan))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(each for key, inner in items for each in places(inner, (*at, key)))]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few changed, inserted, removed or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                del changed[at : at + rng.randint(1, 64)]
            case _:
                changed[at:at] = changed[at : at + rng.randint(1, 64)]
    return bytes(changed)


def damage_plan(bundle: Path, rng: random.Random) -> Path:
    file = bundle / "plan.json"
    text = damaged(file.read_bytes(), rng)
    if rng.random() < 0.5:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([b"NaN", b"Infinity", b"1e999", b"null", b'"', b"{", b"[" * 5000, b"../", b"\\ud800"]) + text[at:]
    file.write_bytes(text)
    return bundle


def change_plan(bundle: Path, rng: random.Random) -> Path:
    plan = read_plan(bundle)
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice([each for each in places(plan) if each])
        holder: Any = plan
        for key in way:
            holder = holder[key]
        match rng.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[last]
            case 1 if isinstance(holder, list):
                holder.insert(rng.randint(0, len(holder)), deepcopy(holder[last]))
            case 2 if isinstance(holder, dict):
                # A copy: what holds itself is no JSON.
                holder[rng.choice(["x", "schema", "model", "files", "../x", "__class__"])] = deepcopy(holder[last])
            case _:
                holder[last] = deepcopy(rng.choice(VALUES))
    write_plan(bundle, plan)
    return bundle


def change_settings(bundle: Path, rng: random.Random) -> Path:
    """Ask for odd settings, targets, callers and precisions: all that reaches a runtime from a plan."""
    plan = read_plan(bundle)
    stage = rng.choice(plan["stages"])
    stage["config"] = {rng.choice(SETTINGS): rng.choice([*VALUES[:20], *names_outside(bundle)]) for _ in range(rng.randint(0, 2))}
    stage["target"] = rng.choice([stage["target"], "onnxruntime:CPU", "openvino:CPU", "openvino:AUTO", "onnxruntime:CUDA:0", "null:CPU"])
    stage["precision"] = rng.choice([stage["precision"], "default", "fp16", "bf16", "int8"])
    plan["callers"] = rng.choice([1, 1, 2, 9])
    write_plan(bundle, plan)
    return bundle


def name_outside(bundle: Path, rng: random.Random) -> Path:
    """List, or run, a file outside of the bundle, with the digest that it has."""
    plan = read_plan(bundle)
    name = rng.choice(names_outside(bundle))
    digest = hashlib.sha256((bundle.parent / SECRET).read_bytes()).hexdigest()
    if rng.random() < 0.5:
        old = rng.choice(list(plan["files"]))
        del plan["files"][old]
        (bundle / old).unlink()
    plan["files"][name] = digest
    if rng.random() < 0.5:
        rng.choice(plan["stages"])["model"] = name
    write_plan(bundle, plan, digests=False)
    return bundle


def damage_file(bundle: Path, rng: random.Random) -> Path:
    """Damage a model or its weights, and list what it then is."""
    plan = read_plan(bundle)
    file = bundle / rng.choice(list(plan["files"]))
    file.write_bytes(damaged(file.read_bytes(), rng))
    write_plan(bundle, plan, digests=rng.random() < 0.8)
    return bundle


def change_model(bundle: Path, rng: random.Random) -> Path:
    """Change what a model means: where its weights lie, their sizes, its operators, its interface."""
    plan = read_plan(bundle)
    file = bundle / rng.choice(plan["stages"])["model"]
    model = onnx.load(file, load_external_data=False)
    for _ in range(rng.randint(1, 2)):
        tensor = rng.choice(model.graph.initializer) if model.graph.initializer else None
        node = rng.choice(model.graph.node) if model.graph.node else None
        match rng.randrange(7):
            case 0 | 1 if tensor is not None and tensor.external_data:
                entry = rng.choice(tensor.external_data)
                numbers = ["-1", "0", "1", "18446744073709551615", "9223372036854775807", "x", "4096"]
                entry.value = rng.choice(names_outside(bundle) if entry.key == "location" else numbers).replace("\0", "")
            case 2 if tensor is not None:
                tensor.dims[:] = rng.choice([[], [0], [-1], [1 << 40, 1 << 40], [1, 1], [16, 16, 16]])
            case 3 if tensor is not None:
                tensor.data_type = rng.randrange(0, 30)
            case 4 if node is not None:
                node.op_type = rng.choice(["Loop", "If", "Reshape", "Conv", "MatMul", "NonZero", "Nothing", "StringNormalizer", "Scan"])
            case 5 if node is not None and node.input:
                node.input[0] = rng.choice([*node.output, "", "nowhere"])
            case _:
                value = rng.choice([*model.graph.input, *model.graph.output])
                value.type.tensor_type.elem_type = rng.randrange(0, 30)
                if value.type.tensor_type.shape.dim:
                    value.type.tensor_type.shape.dim[0].dim_value = rng.choice([0, -1, 1, 3, 1 << 40, 1 << 62])
    file.write_bytes(model.SerializeToString())
    write_plan(bundle, plan)
    return bundle


def change_files(bundle: Path, rng: random.Random) -> Path:
    """Take a file away, add one, or put a link or a special file in its place."""
    plan = read_plan(bundle)
    name = rng.choice([*plan["files"], "plan.json", "report.html", "signature.json", "segments", "segments/new", "new"])
    path, secret = bundle / name, bundle.parent / SECRET
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    match rng.randrange(7):
        case 0:
            path.symlink_to(rng.choice([secret, Path("..") / SECRET, bundle, Path("/proc/self/mem"), Path("/dev/zero")]))
        case 1:
            path.parent.mkdir(exist_ok=True)
            os.link(secret, path)
        case 2:
            path.parent.mkdir(exist_ok=True)
            os.mkfifo(path)
        case 3:
            path.mkdir(parents=True)
        case 4:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(rng.randbytes(rng.randint(0, 100)))
    if rng.random() < 0.5 and name != "plan.json":
        plan["files"][name] = hashlib.sha256(secret.read_bytes()).hexdigest()
    if name != "plan.json":
        write_plan(bundle, plan, digests=False)
    return bundle


def zipped(bundle: Path, rng: random.Random) -> Path:
    """Return a zip of the bundle."""
    archive = bundle.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])) as made:
        for each in sorted(bundle.rglob("*")):
            if each.is_file() and not each.is_symlink():
                made.write(each, each.relative_to(bundle).as_posix())
    shutil.rmtree(bundle)
    return archive


def damage_zip(bundle: Path, rng: random.Random) -> Path:
    archive = zipped(bundle, rng)
    archive.write_bytes(damaged(archive.read_bytes(), rng))
    return archive


def slip_zip(bundle: Path, rng: random.Random) -> Path:
    """Add members that would leave the folder, are links, are there twice, or are far larger than they look."""
    outside = names_outside(bundle)
    archive = zipped(bundle, rng)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        member = zipfile.ZipInfo("x")
        member.compress_type = zipfile.ZIP_DEFLATED
        match rng.randrange(4):
            case 0:
                member.filename = rng.choice(outside).replace("\0", "")
                made.writestr(member, b"slipped")
            case 1:
                member.filename = rng.choice(["report.html", "segments/weights.bin", "segments", "plan.json/x"])
                member.external_attr = (stat.S_IFLNK | 0o777) << 16
                made.writestr(member, rng.choice(outside))
            case 2:
                made.writestr(rng.choice(["plan.json", "segments/weights.bin", "segments/"]), b"{}")
            case _:
                made.writestr("segments/zeros", bytes(4 << 20))
    return archive


def nested(bundle: Path, rng: random.Random) -> Path:
    """Any of the others, in a zip."""
    inner = rng.choice([damage_plan, change_plan, name_outside, damage_file, change_model])
    return zipped(inner(bundle, rng), rng)


MUTATIONS: list[Callable[[Path, random.Random], Path]] = [
    damage_plan, change_plan, change_settings, name_outside, damage_file, change_model, change_model, change_files, damage_zip, slip_zip,
    nested,
]  # fmt: skip


def mutate(sound: Path, room: Path, seed: int) -> tuple[str, Path]:
    """Copy the bundle at `sound` into the new folder `room`, mutate it, and return what was done and the path to load."""
    rng = random.Random(seed)
    room.mkdir(parents=True)
    (room / SECRET).write_bytes(b"SECRET" * 200)
    bundle = Path(shutil.copytree(sound, room / "m.aivmm"))
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    return mutation.__name__, mutation(bundle, rng)
