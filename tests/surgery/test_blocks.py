"""What finished blocks gave is kept: passes go on from there, and measure the same as if all had run."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.testing import assert_close

from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.surgery.blocks import BlockOutputCache
from hf_fnl.surgery.calibration import visit_modules
from hf_fnl.surgery.calibration_data import CalibrationData

TEXT = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 17}


def llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT))


def bert() -> nn.Module:
    return T.BertForMaskedLM(T.BertConfig(**TEXT))


def marian() -> nn.Module:
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = T.MarianConfig(vocab_size=50, d_model=12, encoder_ffn_dim=17, decoder_ffn_dim=17, **sizes, pad_token_id=0)
    return T.MarianMTModel(config)


def t5() -> nn.Module:
    return T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=50, d_model=12, d_kv=6, d_ff=17, num_layers=3, num_heads=2, dropout_rate=0.0)
    )


class Skipping(nn.Module):
    """A stack whose first block is heard again after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        kept = x = self.blocks[0](x).tanh()
        for block in self.blocks[1:]:
            x = block(x).tanh()
        return x + kept


class Dense(Skipping):
    """A stack of which every block is given the sum of all before it."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Stage(nn.Module):
    """Blocks in a list of its own, as of Swin."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Stages(Skipping):
    """A list of stages."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Stage(count) for count in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.blocks:
            x = stage(x)
        return x


class Sharing(nn.Module):
    """A block that leaves what it computes to those after it, or uses it, as blocks of Gemma 3n do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        return x + shared.setdefault("first", self.linear(x).tanh())


class Shared(Skipping):
    """A stack of which the first block leaves something in a dictionary that all are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Sharing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, shared)
        return x


def inputs_of(model: nn.Module, rows: int = 3, padded: bool = False) -> dict[str, Tensor]:
    if isinstance(model, Skipping):
        return {"x": torch.randn(rows, 5)}
    ids = torch.randint(3, 50, (rows, 7))
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, **both} | ({"attention_mask": mask} if padded else {})


@pytest.mark.parametrize(
    ("build", "chains"),
    [
        (llama, [3]),
        (bert, [3]),
        (marian, [2, 3]),
        (t5, [3, 3]),
        (Skipping, []),
        (Dense, []),
        (Shared, []),
        (Stages, [2, 2, 3]),
    ],
    ids=["llama", "bert", "marian", "t5", "skipping", "dense", "shared", "stages"],
)
def test_stacks_are_chains_where_each_block_is_given_the_last_ones_output(
    tmp_path: Any, build: Callable[[], nn.Module], chains: list[int]
) -> None:
    model = build().eval()
    inputs = inputs_of(model)
    store = BlockOutputCache(model, tmp_path)
    with torch.no_grad(), store.replacing_forwards():
        store.find_chains(lambda: model(**inputs))
    assert [len(chain.blocks) for chain in store.chains] == chains
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("build", [llama, bert, marian, t5, Skipping, Shared, Stages], ids=lambda build: build.__name__)
def test_what_is_kept_on_disk_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], padded: bool
) -> None:
    stock = build().eval()
    batches = [inputs_of(stock, rows, padded) for rows in (3, 2)]
    state, cut = stock.state_dict(), []
    for is_kept in (True, False):
        if not is_kept:
            monkeypatch.setattr(BlockOutputCache, "passes", lambda self, unfinished: nullcontext())
        model = build()
        model.load_state_dict(state)
        factorize_(model, FactorizationConfig(rank=3), calibration=batches)
        cut.append(model.state_dict())
    for name, value in cut[0].items():
        assert_close(value, cut[1][name], rtol=1e-4, atol=1e-5)


FELT = 3  # passes in which gradients are looked at, one for each batch


def counted_runs(model: nn.Module) -> Counter[str]:
    """How often each linear layer of a model runs from now on, by name."""
    runs: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    return runs


def test_a_block_of_a_stage_sees_what_the_block_before_it_gives_when_it_is_replaced() -> None:
    model, seen = Stages().eval(), {}

    def handle(name: str, moments: Any) -> nn.Module:
        seen[name] = moments.mean
        replaced = nn.Linear(5, 5)
        nn.init.zeros_(replaced.weight)
        nn.init.constant_(replaced.bias, len(seen))
        return replaced

    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    visit_modules(model, dict.fromkeys(names, "inputs"), handle, CalibrationData(model, inputs_of(model)))
    assert [seen[name].mean().item() for name in names[1:]] == [1, 2, 3, 4]


def test_where_nothing_changes_a_block_runs_once_for_each_batch() -> None:
    """All that lies in it is measured in one pass, as it is in one for each."""
    model = llama().eval()
    runs = counted_runs(model)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    requests = {f"model.layers.{i}.{part}": "inputs" for i in range(3) for part in parts}
    batches = [inputs_of(model, rows) for rows in (2, 3, 4)]
    seen: list[dict[str, Any]] = [{}, {}]
    visit_modules(model, requests, seen[0].__setitem__, CalibrationData(model, batches), changes=False)
    looks = 2  # at the first batch, which find the chains; of the second only the last block's output is used
    assert runs["lm_head"] == looks + FELT
    assert [runs[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)] == [1 + 3 + FELT] * 3
    visit_modules(model, requests, seen[1].__setitem__, CalibrationData(model, batches))
    assert seen[0].keys() == requests.keys()
    for name, moments in seen[0].items():
        assert_close(moments.covariance, seen[1][name].covariance)
        assert moments.count == seen[1][name].count == 9 * 7


class SentenceEmbedding(nn.Module):
    """The mean of the last hidden states, as sentence encoders take it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(input_ids=input_ids).last_hidden_state.mean(1)}


def test_a_module_around_a_model_is_calibrated_by_what_it_returns() -> None:
    """Also one that knows of no cache, though the configuration of what it holds does."""
    torch.manual_seed(0)
    encoder, ids = bert().bert.eval(), torch.randint(50, (200, 7))
    with torch.no_grad():
        before = SentenceEmbedding(encoder)(ids)["last_hidden_state"]
        lost = []
        for calibration in (None, {"input_ids": ids}):
            model = SentenceEmbedding(copy.deepcopy(encoder))
            factorize_(model, FactorizationConfig(rank=4, include=["*layer.*"]), calibration=calibration)
            lost.append((model(ids)["last_hidden_state"] - before).norm())
    assert 0 < lost[1] < 0.9 * lost[0]


class Experts(nn.Module):
    """A block that sends each row to one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        for number, expert in enumerate(self.experts):
            chosen = x[:, 0].long() == number
            if chosen.any():
                y[chosen] = torch.cat([x[chosen, :1], expert(x[chosen])[:, 1:]], 1)  # of the next block likewise
        return y


def test_all_experts_of_a_block_are_measured_in_one_pass() -> None:
    """Also where the first batches do not reach all of them."""
    model, rows = nn.Sequential(Experts(), Experts(), Experts()).eval(), torch.randn(3, 8, 5)
    rows[:, :, 0] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    rows[1:, :4, 0] = torch.arange(4.0)
    runs = counted_runs(model)
    requests = {name: "inputs" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, Any] = {}
    visit_modules(model, requests, seen.__setitem__, CalibrationData(model, [{"input": batch} for batch in rows]))
    counts = rows[:, :, 0].long().flatten().bincount().tolist()
    assert {name: moments.count for name, moments in seen.items()} == {
        name: counts[int(name.split(".")[2])] for name in requests
    }
    looks = 3  # that find the chains and all experts; then each block is measured, and runs once more when it is cut
    assert max(runs.values()) <= looks + 2 * len(rows) + FELT


def test_a_block_that_is_done_runs_once_more_for_each_batch() -> None:
    """Each pass runs the block before, whose output is then kept, and the one that it measures; no head runs."""
    model = llama().eval()
    runs = counted_runs(model)
    blocks = range(3)
    requests = {f"model.layers.{i}.mlp.down_proj": "inputs" for i in blocks}
    data = CalibrationData(model, [inputs_of(model, rows) for rows in (2, 3, 4)])
    visit_modules(model, requests, lambda name, moments: None, data)
    looks = 2  # at the first batch, which find the chains; of the second only the last block's output is used
    assert runs["lm_head"] == looks + FELT
    assert runs["model.layers.0.self_attn.q_proj"] == 1 + 2 * 3 + FELT
    assert runs["model.layers.2.self_attn.q_proj"] == 1 + 3 + FELT
    assert runs["model.layers.2.mlp.down_proj"] == 1 + FELT
