"""Sharded checkpoints as files: written by several processes, read anywhere, damaged in any way, hostile."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_opt.checkpointing import (
    CheckpointDamagedError,
    DurableCheckpointIO,
    ShardedCheckpoint,
    consolidate,
    find_checkpoint,
    load_primitives,
    load_whole,
    save_sharded,
)
from lightning_opt.checkpointing.files import keep_a_copy, manifest_path, verify
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.index import covers
from lightning_opt.checkpointing.layout import Part, like, parts_of
from lightning_opt.cli.consolidate import main as consolidate_main
from lightning_opt.errors import ConfigError, StorageError, UntrustedInputError
from lightning_opt.testing import resume
from lightning_opt.testing.ranks import on_ranks, start_ranks, wait_for_ranks


def whole(step=0):
    generator = torch.Generator().manual_seed(1)
    return {
        "even": torch.randn(8, 4, generator=generator) + step,
        "odd": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "short": torch.randn(3, generator=generator, dtype=torch.float64),
        "complex": torch.randn(4, 2, generator=generator, dtype=torch.complex128),
        "scalar": torch.tensor(step),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


def save(path, step, *, extra=None):
    """Write a checkpoint in whatever process group there is, rows over ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {}
    for name, value in whole(step).items():
        sharded = value.ndim and value.numel() and value.dtype != torch.bool
        parts[f"state_dict.{name}"] = parts_of(distribute_tensor(value, mesh, [Shard(0)]) if sharded else value)
    rest = {"global_step": step, "epoch": 0, "numbers": (1, float("-inf")), "t": torch.arange(3), "sharded": {}}
    save_sharded(path, parts=parts, rest={**rest, **(extra or {})}, step=step)


def rotate_and_save(folder, step):
    rotate = lambda: keep_a_copy(folder / "last.ckpt", as_path=folder / "previous.ckpt")  # noqa: E731
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {
        f"state_dict.{n}": parts_of(distribute_tensor(v, mesh, [Shard(0)]))
        for n, v in whole(step).items()
        if n == "even"
    }
    rest = {"global_step": step, "sharded": {}}
    save_sharded(folder / "last.ckpt", parts=parts, rest=rest, step=step, before_publish=rotate)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    on_ranks(lambda: save(folder / "last.ckpt", 4), ranks=3, group=True)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_what_several_processes_write_one_reads(written):
    saved = ShardedCheckpoint(written / "last.ckpt")
    for name, value in whole(4).items():
        found = saved.read(f"state_dict.{name}")
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name
        assert saved.shapes[f"state_dict.{name}"] == tuple(value.shape)
    assert saved.rest["numbers"] == (1, float("-inf"))
    assert torch.equal(saved.rest["t"], torch.arange(3))
    assert verify(written / "last.ckpt").step == saved.step == 4
    names = sorted(path.name for path in (written / "shards").glob("*/*"))
    assert names == [f"rank-0000{rank}.safetensors" for rank in range(3)]


def test_the_files_are_what_the_library_of_the_format_reads(written):
    (path,) = (written / "shards").glob("*/rank-00001.safetensors")
    with safe_open(str(path), "pt") as file:
        assert torch.equal(file.get_tensor("state_dict.even"), whole(4)["even"][3:6])
        assert torch.equal(file.get_tensor("state_dict.odd"), whole(4)["odd"][3:6])


def test_no_file_is_a_pickle(written):
    for path in [path for path in written.rglob("*") if path.is_file()]:
        start = path.read_bytes()[:9]
        assert start[:1] == b"{" or start[8:9] == b"{", path  # JSON, or the length of a JSON header


@pytest.mark.parametrize("seed", range(3))
def test_any_box_is_read_from_the_files_that_hold_it(written, seed):
    saved, value = ShardedCheckpoint(written / "last.ckpt"), whole(4)["even"]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        row, column = (int(torch.randint(0, n, (), generator=generator)) for n in value.shape)
        sizes = [int(torch.randint(0, n + 1, (), generator=generator)) for n in (8 - row, 4 - column)]
        found = saved.read("state_dict.even", offsets=(row, column), sizes=sizes)
        assert torch.equal(found, value[row : row + sizes[0], column : column + sizes[1]])
    with pytest.raises(ValueError, match="not within"):
        saved.read("state_dict.even", offsets=(7, 0), sizes=(2, 4))


def layouts():
    """Lay tensors out over 2 x 2 processes in every way, and read them back into each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    kinds = [Replicate(), Shard(0), Shard(1)]
    values = {}
    for number, (one, other) in enumerate(itertools.product(kinds, kinds)):
        for rows in (8, 5, 1):
            torch.manual_seed(rows + number)
            full = torch.randn(rows, 3)
            values[f"{number}.{rows}"] = full, distribute_tensor(full, mesh, [one, other])
    for rows in (8, 7, 5):  # FSDP2 around what a tensor plan has split along the same dimension
        torch.manual_seed(rows)
        layer = torch.nn.Linear(3, rows)
        full = layer.weight.detach().clone()
        layer.weight = torch.nn.Parameter(distribute_tensor(full, mesh["tensor"], [Shard(0)]))
        layer.bias = torch.nn.Parameter(distribute_tensor(layer.bias.detach(), mesh["tensor"], [Replicate()]))
        fully_shard(layer, mesh=mesh["data"])
        values[f"both.{rows}"] = full, layer.weight
    return values


def test_every_layout_of_two_dimensions_is_written_and_read_exactly(tmp_path):
    path = tmp_path / "last.ckpt"

    def job():
        values = layouts()
        save_sharded(path, parts={name: parts_of(one) for name, (_, one) in values.items()}, rest={})
        saved = ShardedCheckpoint(path)
        wrong = []
        for (name, (_, live)), source in itertools.product(values.items(), values):
            if name.split(".")[1] != source.split(".")[1]:
                continue
            found = like(live, lambda offsets, sizes, source=source: saved.read(source, offsets=offsets, sizes=sizes))
            expected = like(live, lambda o, s, source=source: values[source][0][o[0] : o[0] + s[0], o[1] : o[1] + s[1]])
            if not torch.equal(found.to_local(), expected.to_local()) or found.placements != live.placements:
                wrong.append(f"{source} into {name}")
            if name == source and not torch.equal(found.to_local(), live.to_local()):
                wrong.append(name)
        return {"wrong": wrong, "whole": {name: full for name, (full, _) in values.items()}}

    found = on_ranks(job, ranks=4, group=True)
    assert [one["wrong"] for one in found] == [[]] * 4
    saved = ShardedCheckpoint(path)
    for name, full in found[0]["whole"].items():
        assert torch.equal(saved.read(name), full), name
    # each element is written once, also of what is repeated
    sizes = sum(full.numel() * 4 for full in found[0]["whole"].values())
    files = list((tmp_path / "shards").glob("*/*"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(file.stat().st_size for file in files) == sizes + headers


def test_second_names_share_the_shards_and_what_nobody_names_goes(tmp_path):
    on_ranks(lambda: [rotate_and_save(tmp_path, step) for step in (1, 2, 3)] and None, group=True)
    assert {ShardedCheckpoint(tmp_path / f"{name}.ckpt").step for name in ("last", "previous")} == {2, 3}
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "shards").iterdir()) == ["2", "3"]
    assert torch.equal(load_whole(tmp_path / "previous.ckpt")["state_dict"]["even"], whole(2)["even"])
    DurableCheckpointIO().remove_checkpoint(tmp_path / "previous.ckpt")
    assert [path.name.split("-")[0] for path in (tmp_path / "shards").iterdir()] == ["3"]
    # a single file takes the place of a sharded one
    DurableCheckpointIO().save_checkpoint({"global_step": 9, "epoch": 0}, tmp_path / "last.ckpt")
    assert not (tmp_path / "shards").exists()
    assert find_checkpoint(tmp_path) == tmp_path / "last.ckpt"


def test_where_links_are_impossible_the_older_name_stands_alone_for_a_moment(tmp_path):
    def job():
        os.link = lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
        for step in (1, 2, 3):
            rotate_and_save(tmp_path, step)

    on_ranks(job, group=True)
    assert [ShardedCheckpoint(tmp_path / f"{name}.ckpt").step for name in ("last", "previous")] == [3, 2]
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_a_copy_in_another_folder_would_lack_its_shards(folder, tmp_path):
    with pytest.raises(ValueError, match="same folder"):
        keep_a_copy(folder / "last.ckpt", as_path=tmp_path / "last.ckpt")


def test_shards_are_kept_when_what_needs_them_cannot_be_read(folder, monkeypatch):
    monkeypatch.setattr(
        "lightning_opt.checkpointing.garbage.folder_of", lambda path: (_ for _ in ()).throw(OSError("gone for now"))
    )
    assert collect_garbage(folder) == []
    verify(folder / "last.ckpt")


# --- damage and hostility


def edit(path, change):
    """Change an index and give it a manifest that fits: what an attacker, or a bug, would do."""
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    manifest = json.loads(manifest_path(path).read_text())
    import hashlib

    content = path.read_bytes()
    manifest["entry"] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_path(path).write_text(json.dumps(manifest))


def piece(said, number=0, name="state_dict.even"):
    return said["tensors"][name][2][number]


def set_in(container, key, value):
    container[key] = value


HOSTILE = {
    "a folder above": lambda said: set_in(said, "folder", "shards/../../secret"),
    "an absolute folder": lambda said: set_in(said, "folder", "/etc"),
    "another folder": lambda said: set_in(said, "folder", "."),
    "a file elsewhere": lambda said: set_in(said["files"], "../../secret.safetensors", [1, "0"]),
    "an absolute file": lambda said: set_in(said["files"], "/etc/passwd", [1, "0"]),
}
DAMAGED = {
    "a gap": lambda said: said["tensors"]["state_dict.even"][2].pop(),
    "an overlap": lambda said: set_in(piece(said, 1)[2], 0, 2),
    "too large a piece": lambda said: set_in(piece(said)[3], 0, 4),
    "another shape": lambda said: set_in(said["tensors"]["state_dict.even"][1], 0, 80),
    "a huge shape": lambda said: said["tensors"].update(
        {"x": ["float32", [10**12], [["rank-00000.safetensors", "x", [0], [10**12]]]]}
    ),
    "a huge number": lambda said: set_in(said["tensors"]["state_dict.even"][1], 0, 10**40),
    "a negative number": lambda said: set_in(piece(said)[2], 0, -1),
    "a truth for a number": lambda said: set_in(piece(said)[2], 0, True),
    "a wider dtype": lambda said: set_in(said["tensors"]["state_dict.even"], 0, "float64"),
    "a dtype that is none": lambda said: set_in(said["tensors"]["state_dict.even"], 0, "load"),
    "another dtype": lambda said: set_in(said["tensors"]["state_dict.even"], 0, "int32"),
    "another key": lambda said: set_in(piece(said), 1, "state_dict.odd"),
    "a key of nothing": lambda said: set_in(piece(said), 1, "nothing"),
    "a file that is not listed": lambda said: set_in(piece(said), 0, "rank-00009.safetensors"),
    "a wrong size": lambda said: set_in(said["files"]["rank-00000.safetensors"], 0, 5),
    "a wrong sha256": lambda said: set_in(said["files"]["rank-00000.safetensors"], 1, "0" * 64),
    "a later version": lambda said: set_in(said, "version", 2),
    "another format": lambda said: set_in(said, "format", "x"),
    "no tensors": lambda said: said.pop("tensors"),
    "no tree": lambda said: set_in(said, "rest", [1]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_index_that_points_elsewhere_is_refused(folder, change):
    edit(folder / "last.ckpt", change)
    for read in (verify, load_whole, load_primitives, find_checkpoint, DurableCheckpointIO().load_checkpoint):
        with pytest.raises(UntrustedInputError, match=r"last\.ckpt") as caught:
            read(folder if read is find_checkpoint else folder / "last.ckpt")
        assert caught.value.exit_code == 8


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_an_index_that_says_what_cannot_be_is_damage(folder, change):
    edit(folder / "last.ckpt", change)
    for read in (load_whole, DurableCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointDamagedError, match=r"last\.ckpt|safetensors"):
            read(folder / "last.ckpt")


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"format": NaN}', '{"a": ' * 30000, '{"format": ' + "9" * 5000 + "}", "{\xff"]
)
def test_what_begins_like_an_index_and_is_none(tmp_path, text):
    path = tmp_path / "last.ckpt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointDamagedError, match=r"last\.ckpt"):
        load_primitives(path)


@pytest.mark.parametrize("what", ["file", "folder", "shards", "pipe"])
def test_links_and_pipes_are_not_followed(folder, tmp_path, what):
    (inner,) = (folder / "shards").iterdir()
    place = {"file": inner / "rank-00000.safetensors", "folder": inner, "shards": folder / "shards"}.get(what)
    if what == "pipe":
        place = inner / "rank-00000.safetensors"
        place.unlink()
        os.mkfifo(place)
    else:
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    for read in (verify, load_whole):
        with pytest.raises(UntrustedInputError, match="link or no ordinary file"):
            read(folder / "last.ckpt")


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "flipped", "longer"])
def test_a_damaged_shard_is_named_and_the_version_before_is_used(tmp_path, caplog, damage):
    on_ranks(lambda: [rotate_and_save(tmp_path, step) for step in (1, 2)] and None, group=True)
    (shard,) = (tmp_path / "shards").glob("2-*/rank-00001.safetensors")
    data = shard.read_bytes()
    changed = {"empty": b"", "half": data[: len(data) // 2], "longer": data + b"x"}
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(changed.get(damage, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]))
    with pytest.raises(CheckpointDamagedError, match=r"rank-00001\.safetensors of last\.ckpt"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert find_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
    assert "rank-00001" in caplog.text
    assert torch.equal(load_whole(tmp_path / "previous.ckpt")["state_dict"]["even"], whole(1)["even"])


def test_a_flipped_byte_of_the_index_is_found(folder):
    path = folder / "last.ckpt"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"step": 4', b'"step": 5'))
    with pytest.raises(CheckpointDamagedError, match="sha256"):
        DurableCheckpointIO().load_checkpoint(path)


def test_covers_against_counting():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        boxes = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            begin = [int(torch.randint(0, 3, (), generator=generator)) for _ in range(2)]
            sizes = [int(torch.randint(1, 4 - b, (), generator=generator)) for b in begin]
            boxes.append((tuple(begin), tuple(sizes)))
        count = torch.zeros(3, 2)
        for (row, column), (rows, columns) in boxes:
            count[row : row + rows, column : column + columns] += 1
        within = all(b + s <= n for box in boxes for b, s, n in zip(*box, (3, 2), strict=True))
        tiled = within and bool((count == 1).all())
        assert covers((3, 2), boxes) == tiled, boxes
        seen.add(tiled)
    assert seen == {True, False}
    assert covers((), [((), ())])
    assert covers((0, 3), [])
    assert not covers((2,), [])


# --- failures while several processes write


def failing_job(folder, failing_rank, code):
    """Save once, then again with a disk that fails on one rank; return what each rank saw."""
    rotate_and_save(folder, 1)
    if dist.get_rank() == failing_rank:
        write = os.write

        def failing(descriptor, data):
            if len(data) > 20:
                raise OSError(code, os.strerror(code))
            return write(descriptor, data)

        os.write = failing
    try:
        rotate_and_save(folder, 2)
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_the_previous_version_stays(tmp_path, rank):
    said = on_ranks(lambda: failing_job(tmp_path, rank, errno.ENOSPC), ranks=3, group=True, timeout_s=30)
    assert all("No space left" in one and "bytes free" in one for one in said), said
    assert all(f"rank {rank}: " in one for number, one in enumerate(said) if number != rank)
    assert torch.equal(load_whole(find_checkpoint(tmp_path))["state_dict"]["even"], whole(1)["even"])
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["last.ckpt", "last.ckpt.json"]


def killed_job(folder, rank, call):
    rotate_and_save(folder, 1)
    rotate_and_save(folder, 2)
    if dist.get_rank() == rank:
        counter = itertools.count(1)
        for name in ("open", "write", "fsync", "replace", "link"):
            setattr(os, name, _counted(getattr(os, name), counter, call))
    with contextlib.suppress(RuntimeError):  # the group is broken where a peer was killed
        rotate_and_save(folder, 3)


def _counted(function, counter, call):
    def run(*args, **kwargs):
        if next(counter) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize(("rank", "calls"), [(0, (1, 3, 5, 9, 12, 16, 22)), (1, (1, 2, 4))])
def test_a_kill_of_any_rank_during_a_save_leaves_a_whole_checkpoint(tmp_path, rank, calls):
    for call in calls:
        folder, logs = tmp_path / str(call), tmp_path / f"logs{call}"
        logs.mkdir()
        started = time.monotonic()
        pids = start_ranks(lambda f=folder, c=call: killed_job(f, rank, c), logs, ranks=2, group=True)
        codes = wait_for_ranks(pids, timeout_s=40)
        assert codes[rank] == -signal.SIGKILL, f"call {call} of rank {rank} was never made: {codes}"
        assert None not in codes, f"a rank hung after {time.monotonic() - started:.0f} s"
        for path in folder.glob("*.ckpt"):
            verify(path)
        found = load_whole(find_checkpoint(folder))
        assert found["global_step"] in (2, 3)
        assert torch.equal(found["state_dict"]["even"], whole(found["global_step"])["even"])


def test_a_folder_that_the_ranks_do_not_share_is_named(tmp_path):
    def job():
        here = tmp_path / str(dist.get_rank())
        try:
            save(here / "last.ckpt", 1)
        except StorageError as error:
            return str(error)
        return ""

    assert all("not the same folder for all ranks" in one for one in on_ranks(job, group=True))
    assert not (tmp_path / "0" / "last.ckpt").exists()


def test_pieces_that_make_up_no_tensor_are_refused_everywhere(tmp_path):
    def job():
        mine = Part(torch.zeros(2), (3 * dist.get_rank(),), (5,))
        try:
            save_sharded(tmp_path / "last.ckpt", parts={"w": mine}, rest={})
        except ConfigError as error:
            return str(error)
        return ""

    assert all("checkpoint[w]" in one and "(5,)" in one for one in on_ranks(job, group=True))
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_loaded_is_refused_everywhere(tmp_path):
    def job():
        bad = {"hyper_parameters": {"net": len}} if dist.get_rank() == 1 else {}
        try:
            save(tmp_path / "last.ckpt", 1, extra=bad)
        except ConfigError as error:
            return str(error)
        return ""

    assert all("hyper_parameters.net" in one for one in on_ranks(job, group=True))
    assert list(tmp_path.iterdir()) == []


# --- one process


def test_one_process_without_a_group(tmp_path):
    save_sharded(tmp_path / "a.ckpt", parts={"state_dict.w": Part(torch.ones(2), (0,), (2,))}, rest={"sharded": {}})
    assert torch.equal(load_whole(tmp_path / "a.ckpt")["state_dict"]["w"], torch.ones(2))


def test_a_sharded_tensor_in_the_rest_is_kept_whole(tmp_path):
    def job():
        mesh = init_device_mesh("cpu", (2,))
        mask = distribute_tensor(torch.arange(6).view(3, 2), mesh, [Shard(0)])
        assert isinstance(mask, DTensor)
        save_sharded(tmp_path / "a.ckpt", parts={}, rest={"callbacks": {"Prune": {"mask": mask}}})

    on_ranks(job, group=True)
    found = ShardedCheckpoint(tmp_path / "a.ckpt").rest["callbacks"]["Prune"]["mask"]
    assert torch.equal(found, torch.arange(6).view(3, 2))


def test_consolidate_by_command(folder, capsys):
    path = folder / "last.ckpt"
    assert consolidate_main([str(path)]) == 0
    out = folder / "last-consolidated.ckpt"
    assert capsys.readouterr().out.strip() == str(out)
    found = torch.load(out, weights_only=True)
    for name, value in whole(4).items():
        assert torch.equal(found["state_dict"][name], value)
    assert found["numbers"] == (1, float("-inf"))
    verify(out)
    assert resume.compare_checkpoints(path, out) == []
    for words, code in (([str(path)], 2), ([], 2), ([str(folder)], 2), ([str(out), "x"], 2), (["--x"], 2)):
        assert consolidate_main(words) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert consolidate_main([str(folder / "nowhere.ckpt")]) == 3
    assert consolidate_main(["--help"]) == 0
    assert "usage: lightning-opt consolidate" in capsys.readouterr().out


def test_consolidate_checks_every_file(folder):
    (shard,) = (folder / "shards").glob("*/rank-00002.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointDamagedError, match="rank-00002"):
        consolidate(folder / "last.ckpt")
    assert not (folder / "last-consolidated.ckpt").exists()
