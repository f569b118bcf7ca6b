"""Files of strangers and damaged ones: one line each, nothing wrong is read, and nothing is written elsewhere."""

import copy
import csv
import json
import linecache
import multiprocessing
import os
import pickle
import shutil
import time
import traceback
import zipfile
from types import SimpleNamespace

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import LossGuard, ParameterGrowthCallback, PredictionWriter, RunSummary, TrainingMonitor
from lit_tokenformer.atomic_io import atomic_folder, atomic_write
from lit_tokenformer.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_tokenformer.checkpoints.load import read_checkpoint
from lit_tokenformer.cli.commands import export_weights, grow_checkpoint, import_weights
from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.restored_state import check_restored_state
from lit_tokenformer.cli.run_identity import RunIdentity
from lit_tokenformer.data import Tokenizer
from lit_tokenformer.data.images.sources import decode_image
from lit_tokenformer.distributed.checkpoint import INDEX, REST, read_folder
from lit_tokenformer.errors import UserError
from lit_tokenformer.inference.text import TextGenerator
from lit_tokenformer.tasks import LitCausalLM
from lit_tokenformer.tasks.rebuild import rebuild_task
from lit_tokenformer.tensor_files import load_pickle

TINY = {"dim": 32, "depth": 1, "num_heads": 2, "param_tokens": 8, "rotary_fraction": 0.5}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}}


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.arange(index, index + 9)


def language_model():
    task = LitCausalLM("tokenformer_lm_tiny", 257, 16, overrides=TINY)
    task.tokenizer_json = Tokenizer.bytes().to_json()
    task.hparams["optimizer"] = ADAMW
    return task


def trainer(folder, **settings):
    callbacks = [ParameterGrowthCallback({1: 16}), TrainingMonitor()]
    callbacks.append(ModelCheckpoint(folder, "good", every_n_epochs=2))
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
        **settings,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of a fit of a tiny language model."""
    folder = tmp_path_factory.mktemp("fit")
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    trainer(folder, max_epochs=2).fit(language_model(), loader, loader)
    return folder / "good.ckpt"


@pytest.fixture
def changed(good, tmp_path):
    """Writes the good checkpoint with other values; returns its path."""

    def write(**values):
        torch.save({**torch.load(good, weights_only=True), **values}, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


@pytest.fixture
def sharded(good, tmp_path):
    """The good checkpoint as a folder."""
    rest = torch.load(good, weights_only=True)
    folder = tmp_path / "folder.ckpt"
    dcp.save({"state_dict": rest.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / REST)
    return folder


class TestWriting:
    def test_a_file_appears_complete_or_not_at_all(self, tmp_path):
        (tmp_path / "a").write_bytes(b"before")
        with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as file:
            file.write(b"half")
            raise RuntimeError
        assert (tmp_path / "a").read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]
        with atomic_write(tmp_path / "a") as file:
            file.write(b"after")
        assert (tmp_path / "a").read_bytes() == b"after" and os.listdir(tmp_path) == ["a"]

    def test_a_folder_appears_complete_or_not_at_all(self, tmp_path):
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "below" / "a") as folder:
            (folder / "x").touch()
            raise RuntimeError
        assert os.listdir(tmp_path / "below") == []
        with atomic_folder(tmp_path / "below" / "a") as folder:
            (folder / "x").touch()
        assert os.listdir(tmp_path / "below" / "a") == ["x"]

    def test_what_a_killed_process_left_of_a_folder_is_removed_by_the_next_with_its_target(self, tmp_path):
        fork = multiprocessing.get_context("fork")

        def write(name, folders):
            with atomic_folder(tmp_path / name) as folder:
                (folder / "x").touch()
                folders.put(folder)
                time.sleep(60)

        def leave(name):
            folders = fork.SimpleQueue()
            process = fork.Process(target=write, args=(name, folders))
            process.start()
            return process, folders.get()

        (killed, left), (other, of_another), (running, busy) = (leave(name) for name in ("a", "b", "a"))
        try:
            for process in (killed, other):
                process.kill()
                process.join()
            own = tmp_path / f"{left.name[:25]}{'x' * 24}.part"  # a user's
            for path in (own, tmp_path / "elsewhere"):
                path.mkdir()
                (path / "thesis.txt").touch()
            link = left.with_name(f"{left.name[:25]}{'0' * 24}.part")
            link.symlink_to("elsewhere")
            assert left.is_dir() and busy.is_dir()
            with atomic_folder(tmp_path / "a"):
                assert not left.exists() and busy.is_dir() and of_another.is_dir()
            assert (own / "thesis.txt").exists() and (tmp_path / "elsewhere" / "thesis.txt").exists()
        finally:
            running.kill()
            running.join()

    @pytest.mark.parametrize("name", ["model{}.ckpt.part", "model{}.ckpt", "tokenizer.json"])
    @pytest.mark.parametrize("command", ["grow", "import"])
    def test_a_link_in_a_folder_does_not_decide_where_is_written(self, command, name, good, tmp_path):
        secret = tmp_path / "secret"  # a link to what is not there yet is followed too
        if name.endswith(".part"):
            secret.write_text("kept")
        folder = export_weights(str(good), str(tmp_path / "stranger"))
        shutil.copy(good, folder / "model-.ckpt")
        tokenizer = shutil.move(folder / "tokenizer.json", tmp_path / "own.json")
        (folder / name.format("--grown" if command == "grow" else "")).symlink_to("../secret")
        if command == "grow":
            grow_checkpoint(str(folder / "model-.ckpt"), 32)
        else:
            import_weights(str(folder), tokenizer=str(tokenizer))
        assert secret.read_text() == "kept" if name.endswith(".part") else not secret.exists()

    def test_export_keeps_a_folder_whose_name_ends_in_part(self, good, tmp_path):
        (tmp_path / "out.part").mkdir()
        (tmp_path / "out.part" / "thesis.txt").touch()
        export_weights(str(good), str(tmp_path / "out"))
        assert (tmp_path / "out.part" / "thesis.txt").exists()

    def test_predictions_have_no_formulas(self, tmp_path):
        writer = PredictionWriter(str(tmp_path / "out.csv"))
        names = ["=1+1", "@SUM(A1)", "-1", "-cmd", "cat"]
        data = SimpleNamespace(predict_name=lambda index: "=HYPERLINK(1).png", class_names=names)
        strategy = SimpleNamespace(broadcast=lambda value: value, barrier=lambda name: None)
        fit = SimpleNamespace(
            **{"strategy": strategy, "datamodule": data, "log_dir": None, "default_root_dir": str(tmp_path)},
            **{"global_rank": 0, "world_size": 1, "is_global_zero": True, "distributed_sampler_kwargs": None},
        )
        task = SimpleNamespace(device_mesh=None, predict_step=lambda batch: None)
        writer.setup(fit, task, "predict")
        writer.on_predict_start(fit, task)
        writer.write_on_batch_end(fit, task, torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]), [0], None, 0, 0)
        writer.on_predict_end(fit, task)
        row = list(csv.reader((tmp_path / "out.csv").open()))[1]
        assert row[::2][:1] + row[1::2] == ["'=HYPERLINK(1).png", "'=1+1", "'@SUM(A1)", "-1", "'-cmd", "cat"]


class TestDamagedCheckpoints:
    @pytest.mark.parametrize("map_location", ["cpu", "meta"])
    def test_zeroed_bytes_are_found(self, good, tmp_path, map_location):
        data, path = bytearray(good.read_bytes()), tmp_path / "zeroed.ckpt"
        tensor = torch.load(good, weights_only=True)["state_dict"]["backbone.stem.embedding.weight"]
        place = data.index(tensor.numpy().tobytes())
        data[place + 100 : place + 600] = bytes(500)
        path.write_bytes(data)
        with pytest.raises(UserError, match="ckpt_path: .*data/.* does not match its checksum"):
            read_checkpoint(path, map_location)

    def test_a_compressed_checkpoint_is_refused(self, good, tmp_path):
        path = tmp_path / "compressed.ckpt"
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record))
        with pytest.raises(UserError, match="ckpt_path: .*its records are compressed"):
            read_checkpoint(path)

    def test_a_file_is_checked_once_until_it_changes(self, good, tmp_path, monkeypatch):
        path, checked = shutil.copy(good, tmp_path / "a.ckpt"), []
        check = zipfile.ZipFile.testzip
        monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: checked.append(1) or check(archive))
        rebuild_task(path, read_checkpoint(path, "meta"))
        assert len(checked) == 1
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError):
            read_checkpoint(path, "meta")

    def test_another_byte_order_is_refused(self, good, tmp_path):
        path = tmp_path / "big.ckpt"
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
            for record in old.infolist():
                data = b"big" if record.filename.endswith("/byteorder") else old.read(record)
                new.writestr(record.filename, data)
        for map_location in ("cpu", "meta"):
            with pytest.raises(UserError, match="ckpt_path: .*its byte order is not"):
                read_checkpoint(path, map_location)

    def test_a_folder_is_read_with_all_its_chunks_or_not_at_all(self, sharded):
        assert len(read_folder(sharded)["state_dict"]) > 10
        index = pickle.loads((sharded / INDEX).read_bytes())
        name = "state_dict.backbone.stem.embedding.weight"
        whole = index.state_dict_metadata[name]
        stored = next(key for key in index.storage_data if key.fqn == name)
        half = copy.deepcopy(whole.chunks[0])
        half.sizes = torch.Size([half.sizes[0] // 2, half.sizes[1]])
        for chunks in ([], [half], [*whole.chunks, half], None):
            changed = copy.deepcopy(index)
            if chunks is None:
                del changed.storage_data[stored]
            else:
                changed.state_dict_metadata[name].chunks = chunks
            (sharded / INDEX).write_bytes(pickle.dumps(changed))
            with pytest.raises(UserError, match=f"ckpt_path: .*: {name} is incomplete"):
                read_folder(sharded)

    @pytest.mark.parametrize("kind", ["size", "dtype", "chunks", "entry", "storage", "length", "index"])
    def test_an_index_of_wrong_kinds_is_one_line(self, kind, sharded):
        index = pickle.loads((sharded / INDEX).read_bytes())
        entry = index.state_dict_metadata["state_dict.backbone.norm.weight"]
        if kind == "size":
            entry.size = torch.Size([10**12])
        elif kind == "dtype":
            entry.properties.dtype = "float32"
        elif kind == "chunks":
            entry.chunks = {"a": 1}
        elif kind == "entry":
            index.state_dict_metadata["state_dict.backbone.norm.weight"] = [1]
        elif kind == "storage":
            index.storage_data = [1]
        elif kind == "length":
            for one in index.storage_data.values():
                one.length = "x"
        else:
            index = torch.Size([3])
        (sharded / INDEX).write_bytes(pickle.dumps(index))
        with pytest.raises(UserError, match="ckpt_path: "):
            read_checkpoint(sharded)

    def test_bytes_of_a_folder_are_compared_with_their_checksums(self, sharded):
        tensor = read_folder(sharded)["state_dict"]["backbone.stem.embedding.weight"]
        data = bytearray((sharded / "__0_0.distcp").read_bytes())
        place = data.index(tensor.numpy().tobytes())
        data[place : place + 100] = bytes(100)
        (sharded / "__0_0.distcp").write_bytes(data)
        with pytest.raises(UserError, match="ckpt_path: .* does not match its checksum"):
            read_folder(sharded)


class FrameSummary:
    """Is read as ``traceback.FrameSummary``, whose making reads a line of any file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return traceback.FrameSummary, (self.path, 1, "name")


class TestStrangers:
    @pytest.mark.parametrize("place", ["file", "old file", "rest", "chunk"])
    def test_no_type_that_reads_files_is_made(self, place, changed, sharded, tmp_path):
        secret = tmp_path / "secret.txt"
        secret.write_text("a line that nobody else should have\n")
        payload, path = {"x": FrameSummary(str(secret))}, sharded
        if place == "file":
            path = changed(rng_states=[payload])
        elif place == "old file":
            path = tmp_path / "old.ckpt"
            torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)
        elif place == "rest":
            torch.save({**torch.load(sharded / REST, weights_only=True), "loops": payload}, sharded / REST)
        else:
            rest = torch.load(sharded / REST, weights_only=True)
            shutil.rmtree(sharded)
            dcp.save({"optimizer_0.param_groups.0.x": payload}, checkpoint_id=sharded, no_dist=True)
            torch.save(rest, sharded / REST)
        with pytest.raises(UserError, match=r"ckpt_path: .*(traceback.FrameSummary|damaged)"):
            read_checkpoint(path)
        assert str(secret) not in linecache.cache

    def test_a_checkpoint_behind_a_url_is_read_as_a_file_is(self, tmp_path):
        secret = tmp_path / "secret.txt"
        secret.write_text("a line that nobody else should have\n")
        url = f"memory://{tmp_path}/remote.ckpt"
        with fsspec.open(url, "wb") as file:
            torch.save({"state_dict": {"x": FrameSummary(str(secret))}}, file)
        with pytest.raises(UserError, match=f"ckpt_path: {url} .*traceback.FrameSummary"):
            WholeCheckpointIO().load_checkpoint(url)
        with fsspec.open(url, "wb") as file:
            torch.save({"state_dict": {"x": torch.ones(2)}}, file)
        assert torch.equal(WholeCheckpointIO().load_checkpoint(url)["state_dict"]["x"], torch.ones(2))
        assert str(secret) not in linecache.cache
        with pytest.raises(UserError, match="ckpt_path: no such file: memory://nowhere/a.ckpt"):
            WholeCheckpointIO().load_checkpoint("memory://nowhere/a.ckpt")

    def test_a_class_that_the_user_has_marked_as_safe_is_loaded(self, tmp_path):
        torch.save({"x": Marked()}, tmp_path / "a.pt")
        with pytest.raises(UserError):
            load_pickle(tmp_path / "a.pt", "path")
        with torch.serialization.safe_globals([Marked]):
            assert isinstance(load_pickle(tmp_path / "a.pt", "path")["x"], Marked)

    def test_states_of_optimizers_and_schedules_are_allowed(self, tmp_path):
        parameters = [torch.nn.Parameter(torch.zeros(2, 3))]
        optimizer = torch.optim.AdamW(parameters)
        optimizer.zero_grad()
        parameters[0].sum().backward()
        optimizer.step()
        schedules = [
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 2]),  # a Counter
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
        ]
        values = {
            "optimizer": optimizer.state_dict(),
            "schedules": [one.state_dict() for one in schedules],
            "parameter": parameters[0],
            "others": [{1}, b"bytes", torch.Size([2]), torch.device("cpu"), torch.bfloat16, 1 << 70],
        }
        values["tensors"] = [torch.zeros(2, dtype=kind) for kind in (torch.bfloat16, torch.bool)]
        for zipped in (True, False):
            torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
            assert load_pickle(tmp_path / "a.pt", "path")["others"] == values["others"]
        torch.save(torch.zeros(2, dtype=torch.uint16), tmp_path / "new.pt")  # which torch writes in another way
        assert load_pickle(tmp_path / "new.pt", "path").dtype == torch.uint16

    def test_values_that_grow_without_bound_are_refused(self, changed):
        doubled, deep, own = [0], [], []
        for _ in range(30):
            doubled = [doubled, doubled]
        for _ in range(200):
            deep = [deep]
        own.append(own)
        hyper_parameters = torch.load(changed(), weights_only=True)["hyper_parameters"]
        for values in (doubled, deep, own):
            path = changed(hyper_parameters={**hyper_parameters, "schedule": values})
            with pytest.raises(UserError, match="ckpt_path: .*(values|nested)"):
                read_checkpoint(path)

    @pytest.mark.parametrize("field", ["depth", "dim", "vocab_size", "param_tokens", "series"])
    def test_sizes_beyond_the_tensors_are_refused_before_a_model_is_made(self, field, changed):
        arguments = torch.load(changed(), weights_only=True)["hyper_parameters"]
        for size in (10_000_000, 10**30):
            path = changed(hyper_parameters={**arguments, "overrides": {**arguments["overrides"], field: size}})
            with pytest.raises(UserError, match="ckpt_path: cannot rebuild a LitCausalLM from "):
                rebuild_task(path, read_checkpoint(path))
        with pytest.raises(UserError, match="depth: 10000000 blocks"):
            rebuild_task(path := changed(grown_depth=10_000_000), read_checkpoint(path))

    def test_a_pipe_is_not_read(self, good, sharded, tmp_path):
        folder = export_weights(str(good), str(tmp_path / "published"))
        for path, read in (
            (tmp_path / "pipe.ckpt", read_checkpoint),
            (sharded / INDEX, lambda _: read_checkpoint(sharded)),
            (folder / "config.json", lambda _: import_weights(str(folder))),
            (tmp_path / "pipe.png", lambda path: decode_image(str(path))),
        ):
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            with pytest.raises(UserError, match="is not a file"):
                read(path)

    @pytest.mark.parametrize("panic", ["loading", "encoding"])
    def test_a_tokenizer_that_panics_is_one_line(self, panic, changed, capfd):
        tokenizer = json.loads(Tokenizer.bytes().to_json())
        if panic == "loading":
            model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
            tokenizer["model"] = {**model, "continuing_subword_prefix": "####"}
        else:
            tokenizer["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
        with pytest.raises(UserError, match="data.tokenizer: the tokenizer in .* is damaged"):
            TextGenerator.load(changed(tokenizer=json.dumps(tokenizer)))
        assert capfd.readouterr().err == ""

    def test_names_in_errors_hold_no_terminal_escapes(self, changed, capfd):
        state = torch.load(changed(), weights_only=True)["state_dict"]
        path = changed(state_dict={**state, "\x1b]0;owned\x07\x9b2J": torch.zeros(1)})
        with pytest.raises(UserError) as error:
            rebuild_task(path, read_checkpoint(path))
        assert "\\x1b]0;owned\\x07\\x9b2J is not part" in str(error.value)


class Marked:
    """A class of a user."""


class TestWeightsOnly:
    @pytest.fixture
    def weights(self, good, tmp_path):
        checkpoint = torch.load(good, weights_only=True)
        for key in ("optimizer_states", "lr_schedulers", "callbacks"):
            del checkpoint[key]
        torch.save(checkpoint, tmp_path / "weights.ckpt")
        return tmp_path / "weights.ckpt"

    def test_they_serve_wherever_weights_are_needed(self, weights, tmp_path):
        TextGenerator.load(weights).generate("a", 2)
        export_weights(str(weights), str(tmp_path / "out"))
        grown = torch.load(grow_checkpoint(str(weights), 32), weights_only=True)
        assert "optimizer_states" not in grown
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
        trainer(tmp_path).validate(language_model(), loader, ckpt_path=weights, verbose=False)

    def test_a_fit_says_that_it_cannot_resume_from_them(self, weights, tmp_path):
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
        with pytest.raises(UserError, match="ckpt_path: the checkpoint has weights only"):
            trainer(tmp_path, max_epochs=3).fit(language_model(), loader, loader, ckpt_path=weights)


def places(value, at=()):
    """Every value in nested values: where it is, and what kind of place that is."""
    yield (
        at,
        tuple("number" if isinstance(key, int) else "weight" if key.startswith("backbone.") else key for key in at),
    )
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for number, inner in enumerate(value):
            yield from places(inner, (*at, number))


def with_another_type(value, at, given=None):
    """A copy in which the value at a place has another type, or is another one."""
    if at:
        found = list(value) if isinstance(value, tuple) else copy.copy(value)
        found[at[0]] = with_another_type(value[at[0]], at[1:], given)
        return found
    if given is not None:
        return given
    for kind, other in ((str, 7), (dict, [1]), (list, {"a": 1}), (tuple, {"a": 1}), (type(None), [3])):
        if isinstance(value, kind):
            return other
    return "x"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "export", "grow", "validate"])
def test_a_value_of_another_type_is_one_line_or_does_no_harm(command, good, tmp_path):
    checkpoint, path = torch.load(good, weights_only=True), tmp_path / "changed.ckpt"
    every = [at for at in {kind: at for at, kind in places(checkpoint)}.values() if at]
    assert len(every) > 100
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    run = {
        "generate": lambda: TextGenerator.load(path).generate("a", 1),
        "export": lambda: export_weights(str(path), str(tmp_path / "out")),
        "grow": lambda: grow_checkpoint(str(path), 32, output=str(tmp_path / "grown.ckpt")),
        "validate": lambda: trainer(tmp_path).validate(language_model(), loader, ckpt_path=path, verbose=False),
    }[command]
    refused = 0
    for at in every:
        torch.save(with_another_type(checkpoint, at), path)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "grown.ckpt").unlink(missing_ok=True)
        try:
            run()
        except UserError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{'.'.join(map(str, at))}: {error!r}")
    assert refused >= 10


class Counter(Callback):
    """A callback of a user, whose state may be of any type."""

    def state_dict(self):
        return {"count": 0}

    def load_state_dict(self, state_dict):
        state_dict["count"] + 1


class TestResume:
    def resumable(self, folder, epochs):
        callbacks = [ParameterGrowthCallback({1: 16}), TrainingMonitor(), EarlyStopping("val/loss"), LossGuard()]
        callbacks += [RunSummary(), RunIdentity({}, None, "a file"), Counter()]
        callbacks.append(ModelCheckpoint(folder, "best", "val/loss", save_last=True))
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        settings["default_root_dir"] = folder
        fit = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **settings)
        fit.strategy.checkpoint_io = WholeCheckpointIO()
        check_restored_state(fit)
        return fit

    @pytest.fixture
    def saved(self, tmp_path):
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
        self.resumable(tmp_path, 2).fit(language_model(), loader, loader)
        return torch.load(tmp_path / "last.ckpt", weights_only=True)

    def resume(self, saved, at, folder, given=None):
        """Resumes from a checkpoint with another value at a place."""
        torch.save(with_another_type(saved, at, given), folder / "last.ckpt")
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
        self.resumable(folder, 3).fit(language_model(), loader, loader, ckpt_path=folder / "last.ckpt")

    @pytest.mark.slow
    def test_a_value_of_another_type_is_one_line_or_does_no_harm(self, saved, tmp_path):
        parts = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "rng_states")
        every = {kind: at for at, kind in places({part: saved[part] for part in parts}) if at}.values()
        counts = {"ready", "started", "processed", "completed"}  # those are tested with a validation
        every = [at for at in every if at[-1] not in counts and at[:2] != ("callbacks", "Counter")]
        refused = 0
        for at in every:
            try:
                self.resume(saved, at, tmp_path)
            except UserError as error:
                assert str(error).startswith(("ckpt_path: ", "optimizer state: "))
                refused += 1
            except Exception as error:
                pytest.fail(f"{'.'.join(map(str, at))}: {error!r}")
        assert refused > 60

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [("wait_count", "x", r"\.wait_count: expected type int"), ("stopping_reason", 7, ": unexpected values")],
    )
    def test_the_line_names_checkpoint_and_callback(self, name, value, told, saved, tmp_path):
        key = next(key for key in saved["callbacks"] if key.startswith("EarlyStopping"))
        with pytest.raises(UserError, match=rf"ckpt_path: \S+/last.ckpt: callbacks: EarlyStopping{{.*}}{told}"):
            self.resume(saved, ("callbacks", key, name), tmp_path, value)

    def test_an_error_in_the_users_own_callback_stays_as_it_is(self, saved, tmp_path):
        with pytest.raises(TypeError, match="can only concatenate str"):
            self.resume(saved, ("callbacks", "Counter", "count"), tmp_path)


def test_the_command_line_reports_a_damaged_checkpoint_in_one_line(good, tmp_path, capfd):
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(data)
    assert main(["generate", "--ckpt_path", str(tmp_path / "flipped.ckpt")]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
