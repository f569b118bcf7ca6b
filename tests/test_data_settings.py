"""Settings of the data modules: nested in YAML, with flat names that earlier versions have."""

import pytest
import yaml

from lit_tokenformer.cli.main import main
from lit_tokenformer.cli.run_identity import defining_settings
from lit_tokenformer.data import ImageDataModule, MaskedTextDataModule, TextDataModule
from lit_tokenformer.data.settings import FLAT_NAMES, HubSettings, LoaderSettings

VALUES = {"pin_memory": True, "streaming": True, "batch_size": 6, "eval_batch_size": 5, "num_workers": 2}
VALUES |= {"shuffle_buffer": 7, **dict.fromkeys(set(FLAT_NAMES) - {*VALUES, "shuffle_buffer"}, "x")}
CONFIGS = {"vit_small": ImageDataModule, "causal_lm_small": TextDataModule, "masked_lm_small": MaskedTextDataModule}
ONLY_IMAGES = {"hf_image_column", "hf_label_column"}


class OwnBatchSize(ImageDataModule):
    """A user's module, with a setting of its own that has the name of a nested one."""

    def __init__(self, batch_size: int = 3, **settings):
        super().__init__(batch_size=2 * batch_size, **settings)


def parsed(capsys, config, *args):
    """The data settings that the command line reads."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, *map(str, args), "--print_config"])
    assert stop.value.code in (None, 0)
    return yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]


@pytest.mark.parametrize("config", CONFIGS)
def test_flat_names_set_the_nested_settings(config, tmp_path, capsys):
    names = [name for name in FLAT_NAMES if config == "vit_small" or name not in ONLY_IMAGES]
    file = tmp_path / "flat.yaml"
    file.write_text(yaml.safe_dump({"data": {"init_args": {name: VALUES[name] for name in names}}}))
    from_file = parsed(capsys, config, "--config", file)
    options = [f"--data.{name}={str(VALUES[name]).lower()}" for name in names]
    nested = [f"--data.{FLAT_NAMES[name]}={str(VALUES[name]).lower()}" for name in names]
    assert from_file == parsed(capsys, config, *options) == parsed(capsys, config, *nested)
    assert {name: from_file[group][key] for name in names for group, key in [FLAT_NAMES[name].split(".")]} == {
        name: VALUES[name] for name in names
    }


@pytest.mark.parametrize("kind", [*CONFIGS.values()])
def test_python_accepts_both_forms(kind):
    flat = kind(batch_size=6, num_workers=2, hf_name="x", hf_val_split="y")
    nested = kind(loader=LoaderSettings(batch_size=6, num_workers=2), hub=HubSettings(name="x", val_split="y"))
    assert flat.data_settings == nested.data_settings
    assert flat.batch_size == flat.eval_batch_size == nested.eval_batch_size == 6
    assert flat.num_workers == nested.num_workers == 2
    assert kind(loader=LoaderSettings(num_workers=2)).batch_size == kind().batch_size  # no other default
    with pytest.raises(TypeError, match="unexpected keyword argument 'hf_nme'"):
        kind(hf_nme="x")


def test_a_users_own_setting_keeps_its_name(capsys):
    found = parsed(capsys, "vit_small", "--data", f"{__name__}.OwnBatchSize", "--data.batch_size", 4)
    assert found["batch_size"] == 4 and OwnBatchSize(4).batch_size == 8


def test_a_run_has_the_identity_of_earlier_versions():
    from jsonargparse import Namespace

    loader = Namespace(batch_size=6, num_workers=2)
    data = Namespace(class_path="a.B", init_args=Namespace(loader=loader, hub=Namespace(name="x", streaming=False)))
    found = defining_settings(Namespace(trainer=Namespace(), data=data))
    assert {name: found[name] for name in found if name.startswith("data")} == {
        **{"data": "a.B", "data.batch_size": 6, "data.hf_name": "x", "data.streaming": False},
        **{"data.loader": True, "data.hub": True},
    }


@pytest.mark.parametrize(
    "option", ["hub.name", "hf_name", "loader.num_workers", "num_workers", "augmentation.auto_augment"]
)
def test_null_on_the_command_line_is_no_text(option, capsys):
    found = parsed(capsys, "vit_small", f"--data.{option}", "null")
    group, _, name = FLAT_NAMES.get(option, option).partition(".")
    assert found[group][name] is None
