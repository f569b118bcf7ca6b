"""Data of strangers: no program is started for a picture, and no file outside of a data set is opened."""

import io

import datasets
import pytest
from PIL import EpsImagePlugin, Image

from lit_tokenformer.data.hub import load_hub_data
from lit_tokenformer.data.images.sources import decode_hub_image, decode_image
from lit_tokenformer.errors import UserError


def test_a_picture_that_is_a_program_is_not_opened(tmp_path, monkeypatch):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.jpg").write_bytes(picture.getvalue())
    for source in (str(tmp_path / "x.jpg"), io.BytesIO(picture.getvalue())):
        with pytest.raises(OSError, match="cannot identify image file"):
            decode_image(source)


@pytest.mark.parametrize("ending", ["jpg", "png", "ppm", "bmp", "pgm", "tif", "webp", "gif", "jp2"])
def test_raster_formats_are_opened(ending, tmp_path):
    Image.new("L" if ending == "pgm" else "RGB", (4, 4)).save(tmp_path / f"x.{ending}")
    assert decode_image(str(tmp_path / f"x.{ending}")).size == (4, 4)


def test_a_link_in_a_data_set_does_not_lead_out_of_it(tmp_path):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "own" / "link.png").symlink_to("../secret.png")
    with pytest.raises(UserError, match="references .*, outside of its folders"):
        decode_hub_image({"bytes": None, "path": f"{tmp_path}/own/link.png"}, (str(tmp_path / "own"),))


@pytest.mark.parametrize("place", ["{}/secret.txt", "../secret.txt", "file://{}/secret.txt", "link.txt"])
def test_a_data_set_names_no_file_outside_of_its_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("a line\n")
    (tmp_path / "secret.txt").write_text("a secret\n")
    (tmp_path / "own" / "link.txt").symlink_to("../secret.txt")
    for path in (place.format(tmp_path), "a.txt"):
        header = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {path}\n"
        (tmp_path / "own" / "README.md").write_text(f"---\n{header}---\n")
        if path != "a.txt":
            with pytest.raises(UserError, match="secret.txt|link.txt"):
                load_hub_data("own")
    assert load_hub_data("own")["train"][:] == {"text": ["a line"]}
