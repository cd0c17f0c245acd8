"""Spearman's correlation of cosines with labels, against scipy and by hand."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from secateur.data import default_evaluator, load_data, similarity
from secateur.data.similarity import ranks
from secateur.errors import DataError
from secateur.models import Loaded


class Vectors(nn.Module):
    """Token vectors from a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def pairs(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (len(lengths), max(lengths)), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()}


def test_it_is_spearmans_of_the_mean_vectors_cosine():
    model = Vectors()
    labels = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.5, 4.0])]
    sides = [(pairs(1, [2, 5, 3]), pairs(2, [4, 1, 2])), (pairs(3, [3, 3]), pairs(4, [2, 6]))]
    batches = [{"first": a, "second": b, "labels": y} for (a, b), y in zip(sides, labels, strict=True)]
    cosines = []
    for a, b in sides:
        for i in range(len(a["input_ids"])):
            one, two = (model.table(s["input_ids"][i][s["attention_mask"][i].bool()]).mean(0) for s in (a, b))
            cosines.append(float(torch.nn.functional.cosine_similarity(one, two, dim=0).detach()))
    wanted = spearmanr(cosines, torch.cat(labels).numpy()).statistic
    assert similarity(batches)(model)["spearman"] == pytest.approx(wanted, abs=1e-9)


def test_ranks_share_ties():
    values = numpy.random.default_rng(0).integers(0, 5, 40).astype(float)
    from scipy.stats import rankdata

    assert ranks(torch.tensor(values)).tolist() == (rankdata(values) - 1).tolist()


def test_from_a_table_on_the_command_lines_terms(tmp_path):
    class Tokenizer:
        pad_token = "p"

        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            ids = torch.tensor([[len(t) % 20, len(t) // 2] for t in texts])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    (tmp_path / "a.tsv").write_text("0.1\ta\tbb\n0.9\tccc\tccc\n0.5\tdddd\te\n")
    loaded = Loaded(Vectors(), task="text-encoder", tokenizer=Tokenizer())
    data = load_data(f"text:{tmp_path / 'a.tsv'}?columns=1,2&label=0&apart=true", loaded=loaded, batch_size=2)
    assert [len(b["labels"]) for b in data] == [2, 1]
    found = default_evaluator(loaded, data)(loaded.model)
    assert set(found) == {"spearman"}
    assert -1 <= found["spearman"] <= 1
    with pytest.raises(DataError, match="two columns"):
        load_data(f"text:{tmp_path / 'a.tsv'}?columns=1&label=0&apart=true", loaded=loaded)
    with pytest.raises(DataError, match="which two columns"):
        load_data(f"text:{tmp_path / 'a.tsv'}?apart=true", loaded=loaded)


def test_bad_batches_are_named():
    model = Vectors()
    same = {"first": pairs(1, [2]), "second": pairs(2, [3]), "labels": torch.tensor([1.0])}
    with pytest.raises(DataError, match="all labels are alike"):
        similarity([same, same])(model)
    with pytest.raises(DataError, match="pairs with a label"):
        similarity([pairs(1, [2])])(model)
    with pytest.raises(DataError, match="no batches"):
        similarity([])(model)
