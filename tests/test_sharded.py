"""Growth, resume and checkpoints of a model divided among two processes, by FSDP2 or by its parameter tokens."""

import csv
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.commands import grow_checkpoint
from lit_tokenformer.distributed.checkpoint import (
    INDEX,
    NON_FINITE,
    REST,
    is_sharded,
    mend_folders,
    read_folder,
    read_index,
)
from lit_tokenformer.distributed.strategy import GrowingModelParallelStrategy, make_growing
from lit_tokenformer.growth.shards import shares
from lit_tokenformer.models import param_tokens
from lit_tokenformer.tasks.rebuild import rebuild_task

ROOT = Path(__file__).parents[1]


def run(folder, processes):
    """Runs the scenarios in processes that meet at the store of torchrun: no port is chosen before it is bound."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # freed memory goes back, so that what is resident is what is used
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(ROOT / "tests" / "sharded_scenarios.py"), str(folder)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes, and then one alone, have found; and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    for processes in (2, 1):
        run(folder, processes)
    ranks = [torch.load(folder / f"found-2-{rank}", weights_only=True) for rank in (0, 1)]
    return ranks, torch.load(folder / "found-1-0", weights_only=True), folder


def difference(one, other, epoch=-1):
    one, other = one["epochs"][epoch], other["epochs"][epoch]
    assert one.keys() == other.keys()
    worst = max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
    print(f"largest difference of weights and moments: {worst:.2g}")
    return worst


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize(
        ("divided", "alone"),
        [(name, name) for name in ("even", "uneven", "axes", "token axes", "tasks", "muon")] + [("tokens", "uneven")],
        ids=str,
    )
    def test_a_growing_fit_equals_that_of_one_process(self, found, divided, alone):
        ranks, one, _ = found
        events = {"tasks": 1}.get(alone, 2)
        assert ranks[0][divided]["events"] == ranks[1][divided]["events"] == one[alone]["events"] == events
        for epoch in range(
            len(one[alone]["epochs"])
        ):  # weights, moments and step counts; before, between and after the growths
            assert difference(ranks[0][divided], one[alone], epoch) < 1e-6

    def test_tasks_that_accumulate_apart_train_as_one_process_with_one_large_batch(self, found):
        ranks, one, _ = found
        for rank in ranks:
            assert rank["several"]["step"] == one["several"]["step"] == 3
            assert difference(rank["several"], one["several"]) < 1e-6

    @pytest.mark.parametrize(
        "path",
        [
            f"{name}.ckpt"
            for name in ("even/end1", "uneven/end1", "uneven/end0", "axes/end1", "axes/end0", "tasks/end0", "muon/end1")
        ],
    )
    def test_a_resume_ends_bit_equal_to_the_fit_that_was_not_stopped(self, found, path):
        ranks, _, _ = found
        for rank in ranks:
            assert rank[f"{path} again"]["step"] == rank[path.split("/")[0]]["step"]
            assert difference(rank[f"{path} again"], rank[path.split("/")[0]]) == 0

    def test_fsdp2_grows_and_resumes_bit_equal_on_the_command_line(self, found):
        ranks, _, folder = found
        assert ranks[0]["fsdp2"] == ranks[1]["fsdp2"] == [0, 0, 0]
        runs = ["fsdp2/lightning_logs/version_0", "fsdp2-stopped/lightning_logs/version_1"]
        whole, resumed = (read_checkpoint(folder / run / "checkpoints" / "last.ckpt") for run in runs)
        assert whole["global_step"] == resumed["global_step"] == 6
        assert whole["param_tokens"] == resumed["param_tokens"] == {"qkv": 16, "proj": 16, "ffn": 64}
        for name, tensor in whole["state_dict"].items():
            assert torch.equal(tensor, resumed["state_dict"][name])
        moments, others = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed))
        assert moments.keys() == others.keys()
        assert all(torch.equal(moments[name][key], others[name][key]) for name in moments for key in moments[name])

    def test_a_resume_on_another_division_ends_as_the_fit_that_was_not_stopped(self, found):
        ranks, one, _ = found
        assert difference(ranks[0]["tokens as data"], ranks[0]["tokens"]) < 1e-6
        for name in ("even", "uneven"):  # a file and a folder
            for how in ("from several", "on a mesh of one"):
                assert difference(one[f"{name} {how}"], ranks[0][name]) < 1e-6

    def test_another_trainer_reads_a_checkpoint_of_another_size_into_the_divided_model(self, found):
        sizes = found[0][0]["uneven/end1.ckpt again"]["sizes of the checkpoint"]
        assert sizes == {"qkv": 13, "proj": 11, "ffn": 47}

    def test_a_torch_under_which_nothing_can_grow_ends_growing_fits_only_and_in_one_line(self, found):
        said = found[1]["unknown torch"]
        assert said["still"] == "6"
        assert said["dropout"].startswith("trainer.strategy: a model cannot grow under FSDP2 in torch")
        assert "FSDPParam takes" in said["dropout"] and "\n" not in said["dropout"]

    def test_folders_are_saved_whole_or_not_at_all(self, found):
        for rank in found[0]:
            over_a_link, over_a_folder, on_a_full_disk, failed = rank["folders"].values()
            there = ["best.ckpt", "last.ckpt"]
            assert over_a_link == ["", False, ["0", "0"], there]
            assert over_a_folder == ["", False, ["1", "1"], there]
            assert on_a_full_disk == ["", True, ["1", "1"], there]
            assert failed[0] == "cannot save /last.ckpt: no such luck" and failed[2:] == [["1", "1"], there]

    def test_processes_with_the_same_data_drop_the_same_paths_and_patches(self, found):
        ranks, one, _ = found
        assert difference(ranks[0]["dropout"], ranks[1]["dropout"]) == 0
        for epoch in range(2):
            assert difference(ranks[0]["dropout"], one["dropout"], epoch) < 1e-6

    def test_divided_tokens_give_the_outputs_and_gradients_of_whole_ones(self, found):
        for rank in found[0]:
            for norm, layer in rank["layers"].items():
                assert layer["difference"] < 1e-12, norm
        layers = found[0][0]["layers"]
        assert (
            layers["l2_gelu"]["all_reduces"] == 2 * 2
        )  # for each of two layers a number for each token, and the output
        assert layers["gelu"]["all_reduces"] == 2

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
    @pytest.mark.parametrize("method", ["split", "zero_keys"])
    def test_a_growth_takes_no_more_memory_than_the_final_share_and_twice_a_layer(self, found, method):
        for rank in found[0]:
            memory = rank["memory"][method]
            print(*(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items()), sep=", ")
            assert 0.9 * memory["final"] < memory["peak"] <= memory["allowed"]  # freed memory is used again

    def test_norms_of_rows_are_those_of_one_process(self, found):
        folder = found[2]
        several, alone = (
            list(csv.DictReader((folder / name / "metrics.csv").open())) for name in ("uneven", "one-uneven")
        )
        names = [f"rows/{kind}_norm_{age}" for kind in ("grad", "update") for age in ("old", "new")]
        for name in names:
            ours, theirs = ([float(row[name]) for row in rows if row.get(name)] for rows in (several, alone))
            assert len(ours) >= 6
            assert ours == pytest.approx(theirs, rel=1e-3)

    def test_a_folder_is_grown_and_rebuilt_like_a_file(self, found, tmp_path):
        folder = found[2]
        path = folder / "uneven" / "end1.ckpt"
        assert is_sharded(path)
        checkpoint = read_checkpoint(path)
        task = rebuild_task(path, checkpoint)
        assert param_tokens(task) == {"qkv": 13, "proj": 11, "ffn": 47}
        wanted = found[0][0]["uneven"]["epochs"][1]
        for name, tensor in task.state_dict().items():
            assert torch.equal(tensor, wanted[name])
        shapes = read_checkpoint(path, map_location="meta")
        assert {name: tensor.shape for name, tensor in shapes["state_dict"].items()} == {
            name: tensor.shape for name, tensor in checkpoint["state_dict"].items()
        }
        grown = grow_checkpoint(str(path), {"qkv": 26}, output=str(tmp_path / "grown.ckpt"))
        image = torch.randn(2, 3, 8, 8)
        larger = rebuild_task(grown, read_checkpoint(grown))
        assert param_tokens(larger)["qkv"] == 26
        torch.testing.assert_close(larger.eval()(image), task.eval()(image))

    @pytest.mark.parametrize("file", [INDEX, REST, "__0_0.distcp"])
    def test_nothing_in_a_folder_is_executed(self, found, tmp_path, file):
        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        path = tmp_path / "stranger.ckpt"
        shutil.copytree(found[2] / "uneven" / "end1.ckpt", path)
        if file == INDEX:
            (path / file).write_bytes(pickle.dumps(Payload()))
        elif file == REST:
            torch.save({"epoch": Payload()}, path / file)
        else:
            torch.save(Payload(), path / file)
        with pytest.raises(ValueError, match=r"^ckpt_path: .*(damaged|truncated)"):
            read_folder(path)
        assert not (tmp_path / "executed").exists()

    def test_a_folder_that_is_not_whole_is_refused(self, found, tmp_path):
        path = tmp_path / "torn.ckpt"
        shutil.copytree(found[2] / "uneven" / "end1.ckpt", path)
        (path / "__1_0.distcp").unlink()
        with pytest.raises(ValueError, match=r"ckpt_path: .* is incomplete: __1_0\.distcp is missing"):
            read_folder(path)
        (path / INDEX).unlink()
        with pytest.raises(ValueError, match=r"ckpt_path: .*\.metadata"):
            read_folder(path)


def test_a_users_strategy_keeps_its_own_behavior_where_ours_has_none():
    class Own(ModelParallelStrategy):
        def barrier(self, name=None):
            return f"own {name}"

    strategy = Own(save_distributed_checkpoint=False)
    make_growing(strategy)
    make_growing(strategy)
    assert isinstance(strategy, Own) and isinstance(strategy, GrowingModelParallelStrategy)
    assert strategy.barrier("x") == "own x" and not strategy._save_distributed_checkpoint


@pytest.mark.parametrize("folders", [True, False])
def test_a_state_that_is_not_finite_becomes_neither_folder_nor_file(tmp_path, folders):
    strategy = GrowingModelParallelStrategy(save_distributed_checkpoint=folders)
    strategy.checkpoint_io = WholeCheckpointIO()
    with pytest.warns(UserWarning, match=r"non-finite weight at step 3: .*last\.ckpt is not saved"):
        strategy.save_checkpoint({NON_FINITE: "weight", "global_step": 3}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def write_index(folder, saved):
    index = Metadata({"weight": saved}, storage_data={}, storage_meta=StorageMeta())
    (folder / INDEX).write_bytes(pickle.dumps(index))


def test_an_index_by_python_3_11_2_is_read(tmp_path, monkeypatch):
    """It writes members of an enumeration as ``getattr(enumeration, name)``."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self._name_)))
    properties = TensorProperties(torch.float32, memory_format=torch.contiguous_format)
    write_index(tmp_path, TensorStorageMetadata(properties, torch.Size([0]), []))
    assert b"getattr" in (tmp_path / INDEX).read_bytes()
    assert read_index(tmp_path)["weight"].shape == (0,)


@pytest.mark.parametrize("inner", [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), ("text", "join")])
def test_nothing_but_members_of_enumerations_is_looked_up(tmp_path, inner):
    class Payload:
        def __reduce__(self):
            return getattr, inner

    write_index(tmp_path, Payload())
    with pytest.raises(ValueError, match=r"ckpt_path: .*\.metadata holds pickled code or is damaged"):
        read_index(tmp_path)


def test_rows_are_shared_as_torch_chunks_them():
    for total in range(1, 20):
        for parts in range(1, 6):
            chunks = torch.arange(total).chunk(parts)
            for part in range(parts):
                wanted = chunks[part].tolist() if part < len(chunks) else []
                assert list(shares(total, [(parts, part)])) == wanted


def test_a_folder_whose_writer_was_killed_between_two_names_is_there_again(tmp_path):
    (tmp_path / "last.ckpt.before").mkdir()
    (tmp_path / "best.ckpt.before").mkdir()
    (tmp_path / "best.ckpt").mkdir()
    mend_folders(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "best.ckpt.before", "last.ckpt"]
