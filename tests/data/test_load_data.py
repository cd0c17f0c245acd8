from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from assets import asset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from secateur.data import DATA, Dataset, load_data
from secateur.data.batches import Batches, labels_of, size_of
from secateur.errors import DataError, RecipeError
from secateur.models import IMAGENET_MEAN, IMAGENET_STD, ImageInput, Loaded

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30), (200, 100, 50)]


def picture(path, colour, size=(8, 6)):
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def classes(tmp_path):
    """Three images of class 'ant', two of class 'bee', PNG so that colours come back exactly."""
    for i, colour in enumerate(COLOURS):
        folder = tmp_path / "photos" / ("ant" if i < 3 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        picture(folder / f"{i}.png", colour)
    return tmp_path / "photos"


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        path = tmp_path / "samples.npz"
        np.savez(path, **arrays)
        return f"npz:{path}"

    return write


def all_of(dataset):
    batches = list(dataset)
    x = torch.cat([b[0] if isinstance(b, tuple) else b for b in batches])
    labels = [labels_of(b) for b in batches]
    return x, None if labels[0] is None else torch.cat(labels)


class TestFolder:
    def test_classes_in_the_order_of_their_names(self, classes):
        data = load_data(f"folder:{classes}", batch_size=2)
        assert (len(data), data.size, data.classes) == (3, 5, ("ant", "bee"))
        x, y = all_of(data)
        assert y.tolist() == [0, 0, 0, 1, 1]
        assert x.shape == (5, 3, 6, 8)
        assert torch.allclose(x[:, :, 2, 3], torch.tensor(COLOURS) / 255)

    def test_flat_folders_have_no_labels(self, classes):
        (batch,) = load_data(f"folder:{classes / 'ant'}")
        assert batch.shape == (3, 3, 6, 8)

    def test_normalisation_by_name_by_number_and_by_the_model(self, classes):
        plain, _ = all_of(load_data(f"folder:{classes}"))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        named, _ = all_of(load_data(f"folder:{classes}?mean=imagenet"))
        assert torch.allclose(named, (plain - mean) / std)
        numbers, _ = all_of(load_data(f"folder:{classes}?mean=0.1,0.2,0.3&std=2"))
        assert torch.allclose(numbers, (plain - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / 2)
        loaded = Loaded(nn.Identity(), image=ImageInput((6, 8), mean=(0.5,), std=(0.25,)))
        known, _ = all_of(load_data(f"folder:{classes}", loaded=loaded))
        assert torch.allclose(known, (plain - 0.5) / 0.25)
        over, _ = all_of(load_data(f"folder:{classes}?mean=0&std=1", loaded=loaded))
        assert torch.allclose(over, plain)

    def test_gray(self, classes):
        x, _ = all_of(load_data(f"folder:{classes}?gray=true"))
        luma = (torch.tensor(COLOURS) * torch.tensor([0.299, 0.587, 0.114])).sum(1)
        assert x.shape == (5, 1, 6, 8)
        assert torch.allclose(x[:, 0, 0, 0] * 255, luma, atol=1)

    def test_resize_and_centre_crop_against_torchvision(self, tmp_path):
        from secateur.models.torchvision_shim import import_torchvision

        transforms = import_torchvision("this test").transforms
        pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.save(tmp_path / "a.png")
        steps = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(20), transforms.ToTensor()])
        (x,) = load_data(f"folder:{tmp_path}?size=20&resize=24")
        assert torch.allclose(x[0], steps(image), atol=1 / 255)

    @given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 30), resize=st.integers(1, 50))
    def test_every_image_comes_out_in_the_size_asked_for(self, width, height, size, resize):
        from secateur.data.images import Preparation

        image = Image.new("RGB", (width, height))
        for side in (None, resize):
            assert Preparation(size=(size, size + 1), resize=side).image(image).shape == (3, size, size + 1)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        Image.new(mode, (4, 4)).save(tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png"))
        (x,) = load_data(f"folder:{tmp_path}")
        assert x.shape == (1, 3, 4, 4)

    def test_ragged_images_name_the_two(self, classes):
        picture(classes / "bee" / "9.png", (1, 2, 3), (5, 5))
        with pytest.raises(DataError, match=r"0\.png is 3x6x8 and .*9\.png is 3x5x5.*size="):
            list(load_data(f"folder:{classes}"))
        assert all_of(load_data(f"folder:{classes}?size=4"))[0].shape == (6, 3, 4, 4)

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "truncated"])
    def test_unreadable_images_are_named(self, classes, content):
        if content == "truncated":
            content = (classes / "ant" / "1.png").read_bytes()[:45]
        (classes / "ant" / "1.png").write_bytes(content)
        with pytest.raises(DataError, match=r"1\.png cannot be read"):
            list(load_data(f"folder:{classes}"))

    def test_folders_without_images(self, tmp_path, classes):
        (tmp_path / "empty" / "below").mkdir(parents=True)
        with pytest.raises(DataError, match="holds no images"):
            load_data(f"folder:{tmp_path / 'empty'}")
        with pytest.raises(DataError, match="Did you mean 'photos'"):
            load_data(f"folder:{tmp_path / 'photo'}")
        with pytest.raises(DataError, match="not a folder"):
            load_data(f"folder:{classes / 'ant' / '0.png'}")
        picture(classes / "stray.png", (0, 0, 0))
        with pytest.raises(DataError, match="beside class folders"):
            load_data(f"folder:{classes}")

    @pytest.mark.parametrize(
        "option", ["size=0", "size=-3", "size=2.5", "size=abc", "size=true", "size=99999999", "mean=x", "std=0", "mean=1,2",
                   "interpolation=magic", "size=1,2,3", "resize=0"],
    )  # fmt: skip
    def test_options_out_of_range(self, classes, option):
        with pytest.raises(DataError):
            list(load_data(f"folder:{classes}?{option}"))

    def test_unknown_options(self, classes):
        with pytest.raises(RecipeError, match="Did you mean 'size'"):
            load_data(f"folder:{classes}?siz=3")


class TestOrder:
    @pytest.fixture
    def numbers(self, npz):
        return npz(x=np.arange(10, dtype=np.float32)[:, None], y=np.arange(10))

    @pytest.mark.parametrize("inside", ["0::2", "1::2", ":3", "-4:", "::-1", "2:9:3"])
    def test_slices_are_python_s(self, numbers, inside):
        start, stop, step = (*(int(p) if p else None for p in inside.split(":")), None)[:3]
        _, y = all_of(load_data(f"{numbers}[{inside}]", batch_size=3))
        assert y.tolist() == list(range(10))[start:stop:step]

    def test_passes_repeat(self, numbers):
        data = load_data(numbers, batch_size=4, shuffle=True, seed=3)
        first, second = all_of(data)[1].tolist(), all_of(data)[1].tolist()
        assert first == second == all_of(load_data(numbers, batch_size=3, shuffle=True, seed=3))[1].tolist()
        assert sorted(first) == list(range(10)) != first
        assert all_of(data.shuffled(1))[1].tolist() != first
        assert [size_of(b) for b in data] == [4, 4, 2]

    def test_limit_after_slice_and_shuffle(self, numbers):
        data = load_data(f"{numbers}[0::2]", limit=3, shuffle=True)
        assert (data.size, len(data)) == (3, 1)
        assert set(all_of(data)[1].tolist()) < {0, 2, 4, 6, 8}
        assert load_data(numbers, limit=99).size == 10

    def test_the_user_s_generator_is_left_alone(self, numbers):
        before = torch.get_rng_state()
        list(load_data(numbers, shuffle=True))
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_slice_that_selects_nothing(self, numbers):
        with pytest.raises(DataError, match="selects none of its 10"):
            load_data(f"{numbers}[10:]")

    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "3"])
    def test_batch_sizes_out_of_range(self, numbers, size):
        with pytest.raises(DataError, match="batch_size"):
            load_data(numbers, batch_size=size)
        with pytest.raises(DataError, match="limit"):
            load_data(numbers, limit=size)

    def test_only_what_is_reached_is_made(self):
        made = []

        class Slow:
            classes = None

            def __len__(self):
                return 100

            def batch(self, indices):
                made.append(list(indices))
                return torch.zeros(len(indices), 1)

        next(iter(Dataset(Slow(), range(100), 10, "slow")))
        assert made == [list(range(10))]


class TestNpz:
    def test_uint8_images_become_channels_first_0_to_1(self, npz):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
        x, y = all_of(load_data(npz(images=pixels, labels=np.array([3, 1, 2, 0], dtype=np.uint8))))
        assert torch.equal(x, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        assert (y.tolist(), y.dtype) == ([3, 1, 2, 0], torch.int64)

    @pytest.mark.parametrize(
        ("shape", "options", "expected"),
        [
            ((2, 5, 6), "", (2, 1, 5, 6)),
            ((2, 3, 5, 6), "", (2, 3, 5, 6)),
            ((2, 3, 5, 3), "?layout=nhwc", (2, 3, 3, 5)),
            ((2, 5, 6), "?layout=flat", (2, 30)),
            ((2, 30), "", (2, 30)),
            ((2, 8, 8, 3), "?size=4", (2, 3, 4, 4)),
            ((2, 8, 8, 3), "?gray=1", (2, 1, 8, 8)),
            ((2, 8, 8), "?size=4,2", (2, 1, 4, 2)),
        ],
    )
    def test_layouts(self, npz, shape, options, expected):
        (x,) = load_data(npz(x=np.zeros(shape, np.uint8)) + options)
        assert x.shape == expected
        assert x.dtype == torch.float32

    def test_floats_are_taken_as_they_are(self, npz):
        values = np.random.default_rng(0).normal(size=(3, 2, 4, 4))
        loaded = Loaded(nn.Identity(), image=ImageInput((9, 9), mean=(0.5,), std=(0.5,)))
        (x,) = load_data(npz(x=values), loaded=loaded)
        assert torch.equal(x, torch.from_numpy(values).float())
        (x,) = load_data(npz(x=values) + "?mean=1&std=2")
        assert torch.allclose(x, (torch.from_numpy(values).float() - 1) / 2)
        with pytest.raises(DataError, match="only uint8"):
            load_data(npz(x=values) + "?size=3")

    def test_whole_numbers_stay_whole(self, npz):
        (x,) = load_data(npz(x=np.arange(6, dtype=np.int32).reshape(2, 3)))
        assert x.dtype == torch.int64

    @pytest.mark.parametrize(
        "names", [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")]
    )
    def test_splits_either_way_round(self, npz, names):
        arrays = dict(zip(names, (np.zeros((3, 2)), np.zeros(3, int), np.ones((2, 2)), np.ones(2, int)), strict=True))
        source = npz(**{k: v.astype(np.float32) if v.ndim == 2 else v for k, v in arrays.items()})
        x, y = all_of(load_data(source + "?split=test"))
        assert (x.shape, x.min(), y.tolist()) == ((2, 2), 1, [1, 1])
        with pytest.raises(DataError, match="several splits"):
            load_data(source)
        with pytest.raises(DataError, match=r"Did you mean 'train'"):
            load_data(source + "?split=trian")

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({}, "empty archive"),
            ({"weights": np.zeros(3)}, "it holds weights"),
            ({"x": np.zeros((0, 3))}, "no samples"),
            ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "3 samples and 2 labels"),
            ({"x": np.zeros((3, 2)), "y": np.float32(2)}, "scalar"),
            ({"x": np.zeros((3, 2)), "y": np.array(["a", "b", "c"])}, "labels .* <U1"),
            ({"x": np.array(["a"])}, "<U1"),
            ({"x": np.zeros(3, complex)}, "complex"),
            ({"x": np.array([{}, {}], dtype=object)}, "pickled"),
            ({"jpeg": np.zeros(4, np.uint8), "offset": np.array([0, 3, 2])}, "do not rise"),
            ({"jpeg": np.zeros(4, np.uint8), "offset": np.array([0, 9])}, "do not rise"),
            ({"jpeg": np.zeros(4, np.uint8), "offset": np.array([-1, 2])}, "do not rise"),
            ({"jpeg": np.zeros(4, np.uint8), "offset": np.array([0])}, "holds no images"),
            ({"jpeg": np.zeros(4, np.float32), "offset": np.array([0, 1])}, "uint8"),
            ({"jpeg": np.zeros(4, np.uint8), "offset": np.array([0, 2, 4]), "label": np.zeros(3)}, "2 samples and 3 labels"),
        ],
    )
    def test_archives_at_fault(self, npz, arrays, words):
        with pytest.raises(DataError, match=words):
            load_data(npz(**arrays))

    def test_bytes_that_are_no_image_are_named(self, npz):
        source = npz(jpeg=np.zeros(40, np.uint8), offset=np.array([0, 20, 40]))
        with pytest.raises(DataError, match=r"image 0 of samples\.npz cannot be read"):
            list(load_data(source))

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"\x80\x04K\x01."])
    def test_files_that_are_no_archive(self, tmp_path, content):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match="not an npz"):
            load_data(f"npz:{tmp_path / 'a.npz'}")

    def test_a_truncated_or_damaged_archive(self, npz, tmp_path):
        source = npz(x=np.random.default_rng(0).normal(size=(50, 50)))
        path = tmp_path / "samples.npz"
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        with pytest.raises(DataError):
            load_data(source)
        path.write_bytes(whole[:9000] + b"\xff" * 100 + whole[9100:])
        with pytest.raises(DataError, match="broken"):
            load_data(source)

    def test_nan_is_refused_with_its_samples(self, npz):
        x = np.zeros((10, 2), np.float32)
        x[5, 1] = np.nan
        with pytest.raises(DataError, match=r"samples 4 to 7.*1 NaN"):
            list(load_data(npz(x=x), batch_size=4))

    def test_one_bare_array(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        with pytest.raises(DataError, match="one bare array"):
            load_data(f"npz:{tmp_path / 'a.npy'}")

    def test_channels_that_do_not_fit_the_mean(self, npz):
        with pytest.raises(DataError, match="3 values and the images 1 channels"):
            list(load_data(npz(x=np.zeros((2, 4, 4), np.uint8)) + "?mean=imagenet"))

    def test_encoded_images(self, npz):
        files = []
        for colour in COLOURS:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
            files.append(buffer.getvalue())
        offset = np.cumsum([0, *map(len, files)])
        source = npz(x_jpeg=np.frombuffer(b"".join(files), np.uint8), offset=offset, label=np.arange(5))
        x, y = all_of(load_data(f"{source}[1::2]", batch_size=1))
        assert y.tolist() == [1, 3]
        assert torch.allclose(x[:, :, 0, 0], torch.tensor([COLOURS[1], COLOURS[3]]) / 255)

    def test_mnist(self):
        data = load_data(f"npz:{asset('mnist.npz')}[0:10000:100]?split=test", batch_size=50)
        x, y = all_of(data)
        assert x.shape == (100, 1, 28, 28)
        assert (float(x.min()), float(x.max())) == (0, 1)
        assert set(y.tolist()) == set(range(10))

    def test_the_imagenet_sample(self):
        data = load_data(f"npz:{asset('imagenet_sample_1000.npz')}[:8]?size=224&resize=256", batch_size=8)
        ((x, y),) = data
        assert x.shape == (8, 3, 224, 224)
        assert y.tolist() == list(range(8))
        whole = load_data(f"npz:{asset('imagenet_sample_1000.npz')}[:8]", batch_size=8)
        ((full, _),) = whole
        assert torch.equal(x, full[:, :, 16:240, 16:240])


class TestCallables:
    @pytest.fixture
    def code(self, tmp_path):
        path = tmp_path / "mydata.py"
        path.write_text(
            "import torch\n"
            "from torch.utils.data import DataLoader, TensorDataset\n"
            "def make(n=3): return [(torch.full((4, 2), float(i)), torch.arange(4)) for i in range(n)]\n"
            "def generator(): yield from make()\n"
            "def dataset(): return TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))\n"
            "def loader(): return DataLoader(dataset(), batch_size=5)\n"
            "def one(): return torch.zeros(3)\n"
            "def nothing(): return []\n"
            "def named(loaded): return [torch.zeros(1, loaded.model.in_features)]\n"
            "def nan(): return [torch.full((2, 2), float('nan'))]\n"
            "class Bad(torch.utils.data.Dataset):\n"
            "    def __len__(self): return 3\n"
            "    def __getitem__(self, i): raise RuntimeError(f'sample {i}')\n"
        )
        return path

    def test_batches_are_passed_on(self, code):
        for name in ("make?n=2", "generator", "loader"):
            data = load_data(f"{code}:{name}")
            first = [size_of(b) for b in data]
            assert first == [size_of(b) for b in data]
        assert len(load_data(f"{code}:make?n=2")) == 2

    @pytest.mark.parametrize("name", ["make", "generator"])
    def test_limit_cuts_the_last_batch(self, code, name):
        data = load_data(f"{code}:{name}", limit=6)
        assert sum(size_of(b) for b in data) == sum(size_of(b) for b in data) == 6

    def test_a_dataset_can_be_sliced(self, code):
        data = load_data(f"{code}:dataset[1::3]", batch_size=2)
        assert all_of(data)[1].tolist() == [1, 4, 7]
        with pytest.raises(DataError, match="torch Dataset"):
            load_data(f"{code}:make[0:2]")

    def test_the_loaded_model_is_handed_over(self, code):
        (batch,) = load_data(f"{code}:named", loaded=Loaded(nn.Linear(7, 2)))
        assert batch.shape == (1, 7)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("one", "returned a Tensor"),
            ("nothing", "no batches"),
            ("maek", "Did you mean 'make'"),
            ("Bad", "sample 0"),
            ("nan", "NaN"),
        ],
    )
    def test_faults(self, code, name, words):
        with pytest.raises(Exception, match=words) as caught:
            list(load_data(f"{code}:{name}"))
        assert isinstance(caught.value, ValueError)


def test_every_kind_is_registered_and_documented():
    assert set(DATA) == {"folder", "npz", "text", "callable"}
    assert all(entry.summary for entry in DATA.values())


def test_a_path_without_a_kind(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    for path, kind in ((tmp_path, "folder"), (tmp_path / "a.npz", "npz")):
        with pytest.raises(DataError, match=f"Did you mean '{kind}:"):
            load_data(str(path))


def test_batches_accepts_a_dataset(npz):
    data = Batches(load_data(npz(x=np.zeros((5, 2), np.float32)), batch_size=2))
    assert [size_of(b) for b in data] == [2, 2, 1]
