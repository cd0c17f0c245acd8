from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from assets import asset
from torch import nn

from secateur.errors import MissingExtra, ModelError, RecipeError
from secateur.models import MODELS, ImageInput, load_model
from secateur.models.torchvision_shim import import_torchvision, prepare_torchvision

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(loaded):
    with torch.inference_mode():
        example = loaded.example
        return loaded.model(**example) if isinstance(example, dict) else loaded.model(example)


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "from secateur.models import Loaded, ImageInput\n"
        "def make(width=4, bias=True): return nn.Linear(width, 2, bias=bias)\n"
        "def told(): return Loaded(nn.Linear(3, 2), task='image', image=ImageInput((8, 8)))\n"
        "def nothing(): pass\n"
        "def state(): return {'weight': 1}\n"
        "def fails(): raise KeyError('deep')\n"
        "def needs(width): return nn.Linear(width, 2)\n"
        "ready = nn.Linear(2, 2)\n"
        "Net = nn.Identity\n"
    )
    return path


def test_every_kind_is_registered_and_documented():
    assert set(MODELS) == {"hf", "timm", "torchvision", "callable", "artifact"}
    assert all(entry.summary for entry in MODELS.values())


def test_a_file_s_callable_with_options(nets):
    loaded = load_model(f"{nets}:make?width=7&bias=false")
    assert loaded.model.weight.shape == (2, 7)
    assert loaded.model.bias is None
    assert not loaded.model.training
    assert (loaded.name, loaded.task, loaded.example) == ("nets:make", "other", None)
    again = load_model(loaded.source)
    assert torch.equal(again.model.weight, loaded.model.weight)


def test_what_is_drawn_is_drawn_from_seed_0_and_the_user_s_generator_is_left_alone(nets):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model(f"{nets}:make").model.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(load_model(f"{nets}:make").model.weight, first)


def test_other_libraries_load_no_pickles_and_the_user_s_own_code_may(nets, tmp_path, monkeypatch):
    torch.save(nn.Linear(2, 3), tmp_path / "whole.pt")
    read = f"import torch\ndef make(**_): return torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)\n"
    nets.write_text(read)
    assert load_model(f"{nets}:make").model.out_features == 3
    prepare_torchvision()
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.load(tmp_path / "whole.pt", weights_only=False))
    with pytest.raises(ModelError, match="Weights only load failed"):
        load_model("timm:resnet18?pretrained=true")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_callable_may_say_more_and_is_found_from_elsewhere(nets, monkeypatch, tmp_path):
    monkeypatch.chdir(nets.parent)
    loaded = load_model("nets.py:told")
    assert loaded.image == ImageInput((8, 8))
    assert loaded.source == f"{nets}:told"
    assert load_model("nets:make?width=3").model.in_features == 3


def test_dtype_by_argument_and_by_option(nets):
    loaded = load_model(f"{nets}:make", dtype=torch.bfloat16)
    assert loaded.model.weight.dtype == torch.bfloat16
    assert loaded.source.endswith("make?dtype=bfloat16")
    assert load_model(loaded.source).model.weight.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int8"):
        load_model(f"{nets}:make?dtype=int8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "returned nothing; expected a torch.nn.Module"),
        ("state", "a state dict has no architecture"),
        ("fails", r"raised KeyError: 'deep' \(nets\.py, line 7\)"),
        ("needs", "missing a required argument: 'width'"),
        ("make?wdth=3", "unexpected keyword argument 'wdth'. Its arguments: width, bias"),
        ("make?width=abc", "TypeError"),
        ("ready", "is a network"),
        ("mkae", "Did you mean 'make'"),
        ("make[0:2]", "slice"),
    ],
)
def test_faulty_callables_are_explained(nets, name, words):
    with pytest.raises(ModelError, match=words):
        load_model(f"{nets}:{name}")


def test_the_cause_is_chained(nets):
    with pytest.raises(ModelError) as caught:
        load_model(f"{nets}:fails")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tim:resnet18", "Did you mean 'timm'"),
        ("timm:resnet17", "Did you mean 'resnet18'"),
        ("timm:resnet18.nope", "no weights 'nope'"),
        ("timm:resnet18?checkpoint_path=x.pth", "pickle"),
        ("timm:resnet18?nonsense=1", "nonsense"),
        ("timm:../../x", "no model"),
        ("torchvision:resnet17", "Did you mean"),
        ("torchvision:resnet18?weights=IMAGENET", "Did you mean 'IMAGENET1K_V1'"),
        ("torchvision:resnet18?nonsense=1", "nonsense"),
        ("hf:not a name", "does not exist"),
        ("hf:a/b/c", "does not exist"),
        ("hf:..", "config.json"),
        ("some/where", "write hf:some/where"),
        ("artifact:nowhere", "does not exist"),
    ],
)
def test_names_that_lead_nowhere(source, words):
    with pytest.raises(ModelError, match=words):
        load_model(source)


def test_unknown_options_of_a_closed_kind():
    with pytest.raises(RecipeError, match="Did you mean 'gguf_file'"):
        load_model("hf:gpt2?gguf_fil=x")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"secateur\[vision\]"):
        load_model("timm:resnet18")


def test_timm_knows_its_preprocessing():
    loaded = load_model("timm:test_convnext?num_classes=3")
    assert loaded.task == "image"
    assert loaded.image.size == tuple(loaded.example.shape[2:])
    assert len(loaded.image.mean) == 3
    assert run(loaded).shape == (1, 3)
    gray = load_model("timm:test_convnext?num_classes=3&in_chans=1")
    assert gray.image.channels == 1
    assert len(gray.image.mean) == 1


def test_torchvision_takes_the_preprocessing_of_its_weights():
    loaded = load_model("torchvision:mobilenet_v3_small?num_classes=5")
    assert loaded.image == ImageInput((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, "bilinear")
    assert run(loaded).shape == (1, 5)
    assert torch.equal(load_model(loaded.source).model.features[0][0].weight, loaded.model.features[0][0].weight)


def test_torchvision_detection_downloads_no_backbone():
    loaded = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert (loaded.task, loaded.image, loaded.example) == ("other", None, None)


def test_an_artifact_directory(nets, tmp_path):
    from secateur.export.artifact import save

    first = load_model(f"{nets}:told")
    save(first.model, tmp_path / "pruned", source=first.source)
    for source in (tmp_path / "pruned", str(tmp_path / "pruned"), f"artifact:{tmp_path / 'pruned'}"):
        loaded = load_model(source)
        assert torch.equal(loaded.model.weight, first.model.weight)
        assert (loaded.name, loaded.image) == ("pruned", ImageInput((8, 8)))
    assert load_model(loaded.source).source == loaded.source


def test_a_directory_that_is_no_artifact(tmp_path):
    with pytest.raises(ModelError, match=r"no secateur\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="write hf:"):
        load_model(tmp_path)


def test_mlpnet_is_what_its_file_holds():
    asset("chita/mlpnet_mnist.safetensors")
    loaded = load_model(f"{EXAMPLES / 'mlpnet_mnist.py'}:make")
    assert sum(p.numel() for p in loaded.model.parameters()) == 784 * 40 + 40 * 20 + 20 * 10
    assert run(loaded).shape == (1, 10)


def test_a_wrong_depth_is_explained():
    asset("cifar10_resnet/resnet20.safetensors")
    with pytest.raises(ModelError, match=r"resnet21\.safetensors"):
        load_model(f"{EXAMPLES / 'cifar_resnet.py'}:make?depth=21")


class TestHuggingFace:
    @pytest.fixture(scope="class")
    def places(self, tmp_path_factory):
        prepare_torchvision()
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        folder = tmp_path_factory.mktemp("hf")
        torch.manual_seed(0)
        words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
        small = {"vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        bert = transformers.BertConfig(**small, max_position_embeddings=16, num_labels=3)
        llama = transformers.LlamaConfig(**small, num_key_value_heads=1, max_position_embeddings=32)
        vit = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
        )
        made = {
            "bert": transformers.BertForSequenceClassification(bert),
            "llama": transformers.LlamaForCausalLM(llama),
            "vit": transformers.ViTForImageClassification(vit),
        }
        for name, model in made.items():
            model.save_pretrained(folder / name)
        fast.save_pretrained(folder / "bert")
        return folder, made

    @pytest.mark.parametrize(("name", "task"), [("bert", "text-encoder"), ("llama", "text-lm"), ("vit", "image")])
    def test_the_class_that_the_config_names(self, places, name, task):
        folder, made = places
        loaded = load_model(f"hf:{folder / name}")
        assert type(loaded.model) is type(made[name])
        assert not loaded.model.training
        assert (loaded.task, loaded.name) == (task, name)
        saved = made[name].state_dict()
        assert all(torch.equal(v, saved[k]) for k, v in loaded.model.state_dict().items())
        assert torch.isfinite(run(loaded).logits).all()
        assert load_model(loaded.source).source == loaded.source

    def test_the_tokenizer_comes_with_it(self, places):
        loaded = load_model(f"hf:{places[0] / 'bert'}")
        assert loaded.tokenizer("a c")["input_ids"] == [2, 4]
        assert load_model(f"hf:{places[0] / 'llama'}").tokenizer is None

    def test_image_facts_from_the_config_or_its_processor(self, places):
        folder = places[0] / "vit"
        assert load_model(f"hf:{folder}").image.size == (16, 16)
        facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
        facts |= {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 16, "width": 16},
            "image_processor_type": "ViTImageProcessor",
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
        expected = ImageInput((16, 16), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 20, "bicubic")
        assert load_model(f"hf:{folder}").image == expected

    def test_dtype(self, places):
        loaded = load_model(f"hf:{places[0] / 'llama'}?dtype=float16")
        assert loaded.model.dtype == torch.float16
        assert load_model(loaded.source).model.dtype == torch.float16

    def copy(self, places, tmp_path, *, without=(), config=None):
        for path in (places[0] / "bert").iterdir():
            if path.name not in without:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        if config:
            known = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps(known | config))
        return f"hf:{tmp_path}"

    def test_pickles_are_refused(self, places, tmp_path):
        source = self.copy(places, tmp_path, without=("model.safetensors",))
        torch.save(places[1]["bert"].state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"pickled \(pytorch_model\.bin\)"):
            load_model(source)

    def test_no_weights_at_all(self, places, tmp_path):
        with pytest.raises(ModelError, match=r"no \.safetensors"):
            load_model(self.copy(places, tmp_path, without=("model.safetensors",)))

    def test_code_beside_the_weights_is_not_run(self, places, tmp_path):
        auto = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
        source = self.copy(places, tmp_path, config={"auto_map": auto, "model_type": "evil", "architectures": ["Evil"]})
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ModelError):
            load_model(source)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["Evil", "AutoConfig", "os", "BertConfig", 7])
    def test_architectures_that_are_no_models(self, places, tmp_path, name):
        with pytest.raises(ModelError):
            load_model(self.copy(places, tmp_path, config={"architectures": [name]}))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model_type": "bert", "hidden_size": "x"}'])
    def test_broken_configs(self, places, tmp_path, content):
        source = self.copy(places, tmp_path)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError):
            load_model(source)

    @pytest.mark.parametrize("header", [80_000_000, 2**63, 11_000_000])
    def test_headers_that_are_too_long(self, places, tmp_path, header):
        source = self.copy(places, tmp_path)
        (tmp_path / "model.safetensors").write_bytes(header.to_bytes(8, "little") + b"{" * 100)
        with pytest.raises(ModelError, match="hostile"):
            load_model(source)

    def test_truncated_weights(self, places, tmp_path):
        source = self.copy(places, tmp_path)
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(ModelError, match="SafetensorError"):
            load_model(source)

    @pytest.mark.parametrize("name", ["x.gguf", "../x.gguf", "/etc/passwd"])
    def test_gguf_files_that_are_not_there(self, tmp_path, name):
        with pytest.raises(ModelError, match="gguf"):
            load_model(f"hf:{tmp_path}?gguf_file={name}")

    def test_a_broken_gguf_file(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
        with pytest.raises(ModelError, match=r"write \?gguf_file=x\.gguf"):
            load_model(f"hf:{tmp_path}")
        with pytest.raises(ModelError):
            load_model(f"hf:{tmp_path}?gguf_file=x.gguf")

    def test_a_hub_that_cannot_be_reached(self, monkeypatch, places):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="cannot be reached"):
            load_model("hf:nobody/nothing-of-this-name")


def test_identity_of_module_and_class(nets):
    assert isinstance(load_model(f"{nets}:Net").model, nn.Identity)


def test_a_declared_operator_is_no_implementation():
    torchvision = import_torchvision("this test")
    assert import_torchvision("this test") is torchvision
    if torchvision.extension._has_ops():
        pytest.skip("this torchvision has its compiled operators")
    with pytest.raises((NotImplementedError, RuntimeError)):
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
