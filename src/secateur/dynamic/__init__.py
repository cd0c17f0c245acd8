"""Execution that depends on the input: gates decide, for each input, what of a model is computed.

`dynamic` puts the gates of a method into a model, calibrates them on data and gives back a `Dynamic`: the same model, with a
`budget` that can be turned while it runs, and a record of what each input cost.

A new method is one new file here. It holds

- a subclass of `Gate` for each kind of part it gates: what the gate learnt is in its buffers, `set_budget` turns the dial, and
  `forward` computes what was chosen and says so by `spend`;
- a frozen dataclass (``kw_only=True``; its fields are the method's options) that is a `Method`: `attach` puts gates into a
  model by its structure and the options alone, so that a saved model can be rebuilt without data; `calibrate`
  fills their buffers;
- ``@DYNAMIC.register("name", source="paper, year, equation")`` above that class,

and is imported below. `secateur methods`, docs/methods.md, `sc.save` and `sc.load` then know it, and
tests/dynamic/test_contract.py wants a small model and its data for it, in tests/dynamic_cases.py.
"""

from secateur.dynamic import dejavu, early_exit, rnp, skip, teal, tokens
from secateur.dynamic.cost import Costs
from secateur.dynamic.gate import Gate
from secateur.dynamic.module import Dynamic, dynamic, rebuild
from secateur.dynamic.registry import DYNAMIC, Method

__all__ = [
    "DYNAMIC",
    "Costs",
    "Dynamic",
    "Gate",
    "Method",
    "dejavu",
    "dynamic",
    "early_exit",
    "rebuild",
    "rnp",
    "skip",
    "teal",
    "tokens",
]
