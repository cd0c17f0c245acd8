from __future__ import annotations

import pytest
import torch
from assets import asset
from torch import nn

from secateur.data import load_data
from secateur.errors import DataError
from secateur.models import Loaded


@pytest.fixture(scope="module")
def tokenizer():
    """Words to numbers, built from scratch: a..j and digits are 4 and up, unknown words 1."""
    from secateur.models.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def lm(tokenizer):
    return Loaded(nn.Identity(), task="text-lm", tokenizer=tokenizer)


@pytest.fixture
def encoder(tokenizer):
    return Loaded(nn.Identity(), task="text-encoder", tokenizer=tokenizer)


@pytest.fixture
def file(tmp_path):
    def write(text, name="a.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


def test_blocks_hold_the_text_without_the_ragged_rest(lm, file):
    data = load_data(f"text:{file('a b c d e f g h')}?seqlen=3", loaded=lm, batch_size=2)
    (batch,) = data
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_several_files_are_one_text(lm, file):
    source = f"text:{file('a b ')},{file('c d', 'b.txt')}?seqlen=2"
    assert [b["input_ids"].tolist() for b in load_data(source, loaded=lm)] == [[[4, 5], [6, 7]]]


def test_slices_select_blocks(lm, file):
    (batch,) = load_data(f"text:{file('a b c d e f')}[1::2]?seqlen=2", loaded=lm)
    assert batch["input_ids"].tolist() == [[6, 7]]


def test_lines_are_padded_to_the_longest_of_their_batch(encoder, file):
    source = f"text:{file(chr(10).join(['a b c', '', 'd', 'e f']))}"
    first, second = load_data(source, loaded=encoder, batch_size=2)
    assert first["input_ids"].tolist() == [[2, 4, 5, 6, 3], [2, 7, 3, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[2, 8, 9, 3]]
    (cut, *_) = load_data(f"{source}?seqlen=3", loaded=encoder, batch_size=1)
    assert cut["input_ids"].tolist() == [[2, 4, 3]]


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("sentence\tlabel\na b\t1\nc\t0\n", "a.tsv", "columns=sentence&label=label"),
        ("1\ta b\n0\tc\n", "a.tsv", "columns=1&label=0"),
        ('label,sentence\n1,"a b"\n0,c\n', "a.csv", "columns=sentence&label=label"),
    ],
)
def test_columns_of_tables(encoder, file, text, name, options):
    (batch,) = load_data(f"text:{file(text, name)}?{options}", loaded=encoder)
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 6, 3, 0]]
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([1, 0], torch.int64)


def test_pairs_and_fractional_labels(encoder, file):
    (batch,) = load_data(f"text:{file('a,b,0.5')}?columns=0,1&label=2", loaded=encoder)
    assert batch["input_ids"].tolist() == [[2, 4, 3, 5, 3]]
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([0.5], torch.float32)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("a b", "?seqlen=3", "2 tokens, fewer than one block of 3"),
        ("", "?seqlen=3", "0 tokens"),
        ("a b", "?seqlen=1", "at least 2"),
        ("a b", "?seqlen=x", "at least 2"),
        ("\n\n", "?lines=true", "no line of text"),
        (b"\xff\xfe\xff", "", "not UTF-8"),
        ("a,b\n1,2", "?columns=c", "no column 'c'"),
        ("a,b\n1,2", "?columns=3", "has 2 columns; column 3"),
        ("a,b\n1,x", "?columns=a&label=b", "row 2: the label 'x' is not a number"),
        ("a,b", "?columns=a", "no rows"),
        ("a,b", "?columns=0,1,2", "one column of text or two"),
        ("a,b", "?columns=-1", "count from 0"),
        ("a,b", "?label=1", "say with columns="),
    ],
)
def test_texts_at_fault(lm, file, text, options, words):
    with pytest.raises(DataError, match=words):
        load_data(f"text:{file(text)}{options}", loaded=lm)


def test_files_and_tokenizers_that_are_not_there(lm, file, tmp_path):
    file("a")
    with pytest.raises(DataError, match=r"Did you mean 'a\.txt'"):
        load_data(f"text:{tmp_path / 'a.tx'}", loaded=lm)
    with pytest.raises(DataError, match="not a file"):
        load_data(f"text:{tmp_path}", loaded=lm)
    for loaded in (None, Loaded(nn.Identity())):
        with pytest.raises(DataError, match="tokenizer"):
            load_data(f"text:{tmp_path / 'a.txt'}", loaded=loaded)


def test_more_tokens_than_the_model_has_positions(lm, file):
    lm.model.config = type("Config", (), {"max_position_embeddings": 4})()
    assert next(iter(load_data(f"text:{file('a b c d e')}", loaded=lm)))["input_ids"].shape == (1, 4)
    with pytest.raises(DataError, match="more than the 4 positions"):
        load_data(f"text:{file('a b c d e')}?seqlen=5", loaded=lm)


def test_wikitext(lm):
    path = asset("wikitext2/test.txt")
    data = load_data(f"text:{path}?seqlen=256", loaded=lm, batch_size=16)
    words = path.read_text(encoding="utf-8").split()
    assert data.size == len(words) // 256
    first = next(iter(data))["input_ids"]
    assert first.shape == (16, 256)
    assert first[0, words.index("a")] == 4


def test_sst2(encoder):
    data = load_data(f"text:{asset('sst2/dev.tsv')}?columns=sentence&label=label", loaded=encoder, batch_size=4)
    batch = next(iter(data))
    lines = asset("sst2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert data.size == len(lines)
    assert batch["labels"].tolist() == [int(line.rpartition("\t")[2]) for line in lines[:4]]
