"""What hangs on a layer goes over to the one that takes its place, or the layer is not taken and the reason is told."""

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from surgery_cases import ARCHITECTURES
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_fnl import FactorizedBertForMaskedLM, diagnose, find_products
from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.surgery import factorize_, merge_
from hf_fnl.surgery.config import FactorizationConfig

FULL = FactorizationConfig(rank_scale=1.0, kinds=("linear", "embedding", "conv"))
LOW = FactorizationConfig(rank=2)
CPU = torch.device("cpu")


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7, dtype=dtype), nn.Linear(7, 7, dtype=dtype))


# Classes


class Same(nn.Linear):
    """Computes as its base."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Standardized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Called(Conv1D):
    def __call__(self, x: Tensor) -> Tensor:
        return -super().__call__(x)


OTHERWISE = {
    "linear": (Doubled, (5, 7), "Linear"),
    "embedding": (Scaled, (5, 7), "Embedding"),
    "conv": (Standardized, (5, 7, 3), "Conv2d"),
    "conv1d": (Called, (5, 7), "Conv1D"),
}


@pytest.mark.parametrize(("cls", "sizes", "stock"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_class_that_computes_otherwise_is_refused_by_name(cls, sizes, stock):
    model = nn.Sequential(cls(*sizes), nn.Linear(5, 7))
    done = factorize_(model, FactorizationConfig(rank=2, kinds=("linear", "embedding", "conv"), include=("0", "1")))
    assert done.skipped == {"0": f"{cls.__name__} does not compute what {stock} does"}
    assert type(model[0]) is cls


def test_a_class_with_the_stock_forward_is_taken_by_name():
    model = nn.Sequential(Same(5, 7), nn.Linear(7, 7))
    done = factorize_(model, LOW)
    assert done.skipped == {"0": "it is a Same, which is not Linear itself: name it in include"}
    factorize_(model, FactorizationConfig(rank=2, include=("0",)))
    assert isinstance(model[0], FactorizedLinear)


@pytest.mark.parametrize("include", [("head",), ("table",), ("*",)], ids=["head", "table", "all"])
def test_a_scaled_embedding_is_not_reached_through_a_tie(include):
    model = nn.ModuleDict({"table": Scaled(11, 7), "head": nn.Linear(7, 11, bias=False), "other": nn.Linear(7, 7)})
    model["head"].weight = model["table"].weight
    config = FactorizationConfig(rank=2, kinds=("linear", "embedding"), include=include)
    if include == ("*",):
        reason = factorize_(model, config).skipped["head"]
        assert "table.weight" in reason
        assert "Scaled does not compute what Embedding does" in reason
    else:
        message = "Scaled does not compute" if include == ("head",) else "no layer of ModuleDict matches"
        with pytest.raises(ValueError, match=message):
            factorize_(model, config)
    assert model["head"].weight is model["table"].weight


def test_gemma_keeps_its_scaled_embedding():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(vocab_size=60, num_key_value_heads=1, head_dim=8, **sizes)
    )
    done = factorize_(gemma, FactorizationConfig(rank=4, kinds=("linear", "embedding")))
    assert "Gemma3TextScaledWordEmbedding does not compute" in done.skipped["lm_head"]


def test_an_attention_of_torch_keeps_what_it_reads_itself():
    options = {"dropout": 0, "batch_first": True, "dtype": torch.float64}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, **options), 2).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = model(x)
    done = factorize_(model, FULL)
    assert_close(model(x), before)
    assert {name.rpartition(".")[2] for name in done.skipped} == {"in_proj_weight", "out_proj"}
    config = FactorizationConfig(rank=2, include=("*out_proj",))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj cannot be .* torch's MultiheadAttention reads"):
        factorize_(model, config)


# What goes over


HOOKS = {
    "forward-kwargs": lambda layer: layer.register_forward_hook(lambda m, a, k, out: out + 1, with_kwargs=True),
    "forward-pre": lambda layer: layer.register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "full-backward": lambda layer: layer.register_full_backward_hook(lambda m, into, out: (7 * into[0],)),
    "full-backward-pre": lambda layer: layer.register_full_backward_pre_hook(lambda m, out: (2 * out[0],)),
}


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_act_after_surgery_and_merging_until_they_are_removed(register):
    model = net()
    plain = run(model)
    handle = register(model[0])
    hooked = run(model)
    assert not all(map(torch.equal, plain, hooked))
    factorize_(model, FULL)
    assert_close(run(model), hooked)
    merge_(model)
    assert_close(run(model), hooked)
    handle.remove()
    assert_close(run(model), plain)


def test_attributes_and_frozen_parts_go_over_both_ways():
    model = net()
    model[0].tag, model[0]._tp_plan = "mine", "colwise"
    model[0].weight.requires_grad_(False)
    model[0].weight._no_weight_decay = True
    factorize_(model, LOW)
    assert model[0].U._no_weight_decay is model[0].V._no_weight_decay is True
    assert (model[0].tag, model[0]._tp_plan) == ("mine", "colwise")
    assert [p.requires_grad for p in model[0].parameters()] == [False, False, True]
    merge_(model)
    assert (model[0].tag, model[0]._tp_plan) == ("mine", "colwise")
    assert model[0].weight._no_weight_decay
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)


def test_a_hook_of_accelerate_that_moves_inputs_goes_over():
    model = net()
    before = run(model)
    for layer in model:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    factorize_(model, FULL)
    assert all(hasattr(layer, "_hf_hook") for layer in model)
    assert_close(run(model), before)
    merge_(model)
    assert all(hasattr(layer, "_hf_hook") for layer in model)
    assert_close(run(model), before)
    remove_hook_from_submodules(model)
    assert_close(run(model), before)


# What is not taken

HANGING = {
    "gradient-hook": (lambda layer: layer.weight.register_hook(lambda grad: 0 * grad), "hooks for its gradient"),
    "accumulated-gradient-hook": (
        lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda p: None),
        "hooks for its gradient",
    ),
    "state-dict-hook": (lambda layer: layer.register_state_dict_post_hook(lambda *a: None), "state dict hooks"),
    "load-hook": (lambda layer: layer.register_load_state_dict_post_hook(lambda *a: None), "load state dict post"),
    "buffer": (lambda layer: layer.register_buffer("scale", torch.ones(1)), "it holds scale besides its weight"),
    "parameter": (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(7))), "it holds gain"),
    "module": (lambda layer: layer.add_module("adapter", nn.Identity()), "it holds adapter besides"),
    "attribute": (
        lambda layer: setattr(layer.weight, "average", torch.ones(7, 5)),
        "its weight has the attribute average",
    ),
    "forward": (lambda layer: setattr(layer, "forward", lambda x: x), "its forward was replaced on this one layer"),
    "compiled": (lambda layer: layer.compile(backend="eager"), "it was compiled by itself"),
}
COMPUTED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "its weight is computed from weight_orig"),
    "old-spectral-norm": (nn.utils.spectral_norm, "its weight is computed from weight_orig"),
    "weight-norm": (nn.utils.parametrizations.weight_norm, "it is parametrized"),
    "spectral-norm": (nn.utils.parametrizations.spectral_norm, "it is parametrized"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "it is parametrized"),
    "float8": (lambda layer: layer.to(torch.float8_e4m3fn), "its weight is of torch.float8_e4m3fn"),
}


@pytest.mark.parametrize(("hang", "reason"), (HANGING | COMPUTED).values(), ids=HANGING | COMPUTED)
def test_what_would_be_lost_keeps_a_layer_dense_and_is_told_or_refused_where_it_is_named(hang, reason):
    model = net(torch.float32)
    hang(model[0])
    before = model[0]
    with pytest.raises(ValueError, match=f"{reason}"):
        factorize_(model, FactorizationConfig(rank=2, include=("0", "0.*")))
    done = factorize_(model, LOW)
    assert list(done.skipped) == ["0"]
    assert reason in done.skipped["0"]
    assert model[0] is before
    assert reason in str(done)


MERGED = {name: HANGING[name] for name in ("load-hook", "buffer", "parameter", "module", "forward", "compiled")}
MERGED["factor-hook"] = (lambda layer: layer.U.register_hook(lambda grad: 0 * grad), "hooks for its gradient")
MERGED["parametrized"] = (lambda layer: nn.utils.parametrizations.orthogonal(layer, "U"), "it is parametrized")


@pytest.mark.parametrize(("hang", "reason"), MERGED.values(), ids=MERGED)
def test_merging_refuses_likewise_and_changes_nothing(hang, reason):
    model = net(torch.float32)
    factorize_(model, LOW)
    hang(model[0])
    layers = list(model)
    with pytest.raises(ValueError, match=f"^0 cannot be merged: .*{reason}"):
        merge_(model)
    assert list(model) == layers


def test_a_layer_that_is_compiled_alone_is_not_taken():
    model = net(torch.float32)
    model[0] = torch.compile(model[0], backend="eager")
    message = "torch.compile wraps this layer alone: compile the model afterwards"
    with pytest.raises(ValueError, match=message):
        factorize_(model, FactorizationConfig(rank=2, include=("0.*",)))
    assert factorize_(model, LOW).skipped == {"0._orig_mod": message}


@pytest.mark.parametrize("how", ["block", "in-place"])
@torch.no_grad()
def test_what_is_compiled_around_a_layer_sees_the_new_one(how):
    model = nn.Sequential(net())
    x = torch.randn(3, 5, dtype=torch.float64)
    if how == "block":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model.compile(backend="eager")
    model(x)
    factorize_(model, FactorizationConfig(rank=1))
    assert torch.linalg.matrix_rank(model(x) - model(0 * x)) == 1
    merge_(model)
    assert torch.linalg.matrix_rank(model(x) - model(0 * x)) == 1


# Values elsewhere


def test_offloaded_weights_are_refused_with_a_way_out_that_works():
    case = ARCHITECTURES["llama"]
    model = case.build()
    expected = model(**case.batch()).logits
    accelerate.cpu_offload(model, execution_device=CPU)
    for part in (model, model.model.layers[1], nn.DataParallel(model)):
        with pytest.raises(ValueError, match=r"accelerate offloads: call accelerate.hooks.remove_hook_from_submodules"):
            factorize_(part, FULL)
    remove_hook_from_submodules(model)
    factorize_(model, FULL)
    assert_close(model(**case.batch()).logits, expected, rtol=1e-3, atol=1e-4)
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match=r"merge_ needs the parameters of .*, which accelerate offloads"):
        merge_(model)


def test_a_device_map_with_a_disk_is_refused(tmp_path):
    model = ARCHITECTURES["llama"].build()
    model.save_pretrained(tmp_path / "model")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"needs the parameters of model.layers.1.self_attn.q_proj, which accelerate"):
        factorize_(loaded, LOW)


def test_conversions_of_our_classes_refuse_offloaded_models():
    stock = ARCHITECTURES["bert"]
    dense = transformers.BertForMaskedLM(transformers.BertConfig(**stock.config))
    ours = FactorizedBertForMaskedLM.from_dense(dense, ffn_rank=4)
    with pytest.raises(ValueError, match=r"from_dense needs the parameters of .*, which accelerate offloads"):
        FactorizedBertForMaskedLM.from_dense(accelerate.cpu_offload(dense, execution_device=CPU), ffn_rank=4)
    with pytest.raises(ValueError, match=r"merge needs the parameters of .*, which accelerate offloads"):
        accelerate.cpu_offload(ours, execution_device=CPU).merge()


def test_what_reads_values_refuses_offloaded_models():
    model = net().eval()
    factorize_(model, FULL)
    products = find_products(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match="0 is on the meta device or offloaded by accelerate"):
        diagnose(model, products)


def test_a_model_without_values_on_purpose_changes_its_shapes():
    with accelerate.init_empty_weights():
        model = net()
    factorize_(model, LOW)
    assert [(layer.U.is_meta, layer.rank) for layer in model] == [(True, 2)] * 2


# What stays dense


class Matrices(nn.Module):
    """Weights that look like matrices, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.lstm = nn.LSTM(5, 7)
        self.conv1d, self.conv3d = nn.Conv1d(5, 7, 1), nn.Conv3d(5, 7, 3)
        self.transposed = nn.ConvTranspose2d(5, 7, 3)
        self.bilinear, self.bag = nn.Bilinear(5, 7, 3), nn.EmbeddingBag(5, 7)
        self.attention = nn.MultiheadAttention(6, 2)
        self.bare, self.experts = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3, 5, 7))
        self.listed = nn.ParameterList([torch.randn(5, 7)])
        self.table, self.image = nn.Embedding(5, 7), nn.Conv2d(5, 7, 3)
        self.positions, self.vector = nn.Parameter(torch.randn(1, 5, 7)), nn.Parameter(torch.randn(5, 1))
        self.norm = nn.LayerNorm(7)


def test_every_matrix_that_stays_dense_is_named_with_the_reason():
    done = factorize_(Matrices(), LOW)
    assert [replacement.name for replacement in done.replacements] == ["linear"]
    owners = {
        "bare": "Matrices", "experts": "Matrices", "listed.0": "ParameterList", "lstm.weight_ih_l0": "LSTM",
        "lstm.weight_hh_l0": "LSTM", "conv1d": "Conv1d", "conv3d": "Conv3d", "transposed": "ConvTranspose2d",
        "bilinear": "Bilinear", "bag": "EmbeddingBag", "attention.in_proj_weight": "MultiheadAttention",
    }  # fmt: skip
    others = {
        "attention.out_proj": "torch's MultiheadAttention reads its weight and does not call it",
        "table": "kind 'embedding' was not asked for",
        "image": "kind 'conv' was not asked for",
    }
    of = "and only weights of Linear, Conv1D, Embedding, Conv2d are factorized"
    assert done.skipped == {name: f"it belongs to a {owner}, {of}" for name, owner in owners.items()} | others


def test_a_layer_that_is_too_small_for_the_rank_stays_dense_unless_it_is_named():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = transformers.Qwen2MoeConfig(vocab_size=50, num_key_value_heads=2, **sizes, **experts)
    done = factorize_(transformers.Qwen2MoeForCausalLM(config), LOW)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert done.skipped[gate] == "its rank can be at most 1"
    assert len(done.replacements) == 7
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 3), nn.Linear(3, 9))
    assert factorize_(net, FactorizationConfig(rank=5)).skipped == dict.fromkeys("12", "its rank can be at most 3")
    assert isinstance(net[0], FactorizedLinear)
    assert type(net[1]) is type(net[2]) is nn.Linear
    assert not factorize_(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 5)), FactorizationConfig(rank=5)).skipped
    empty = nn.Linear(9, 1)
    empty.weight = nn.Parameter(torch.empty(0, 9))  # as nn.Linear(9, 0) has it, with a warning of torch
    assert factorize_(nn.Sequential(nn.Linear(9, 9), empty), LOW).skipped == {"1": "its weight is empty"}
    tied = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 3), nn.Linear(9, 3))
    tied[2].weight = tied[1].weight
    assert list(factorize_(tied, FactorizationConfig(rank=5)).skipped) == ["1"]
    with pytest.raises(ValueError, match=f"rank of {gate} must be in \\[1, 1\\], got 2"):
        factorize_(transformers.Qwen2MoeForCausalLM(config), FactorizationConfig(rank=2, include=("*", "*expert_gate")))
    with pytest.raises(ValueError, match=r"rank of 0 must be in \[1, 3\], got 5"):
        factorize_(nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 9)), FactorizationConfig(rank=5))


def test_patterns_say_what_is_looked_at():
    done = factorize_(Matrices(), FactorizationConfig(rank=2, exclude=("lstm*", "b*", "[a-c]onv*", "experts")))
    assert not [name for name in done.skipped if name.startswith(("lstm", "b", "conv", "experts"))]
    done = factorize_(Matrices(), FactorizationConfig(rank=2, include=("l*",)))
    assert list(done.skipped) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "listed.0"]


def test_experts_are_one_line_a_reason():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)
    done = factorize_(transformers.MixtralForCausalLM(config), LOW)
    reasons = done.skipped_by_reason()
    (experts,) = (names for reason, names in reasons.items() if "MixtralExperts" in reason)
    assert len(experts) == 6
    assert len(str(done).splitlines()) == 1 + len(done.replacements) + len(reasons)
    assert "... (6 in all): dense, it belongs to a MixtralExperts" in str(done)
    shares = {name: parameter.numel() for name, parameter in transformers.MixtralForCausalLM(config).named_parameters()}
    named = {replacement.name for replacement in done.replacements} | set(done.skipped)
    assert {n for n, size in shares.items() if size > 16 and n.removesuffix(".weight") not in named} == set()


def test_a_factorized_model_names_nothing_twice():
    model = net(torch.float32)
    factorize_(model, FactorizationConfig(rank=2, include=("0",)))
    done = factorize_(model, LOW)
    assert not done.skipped
    assert all(isinstance(layer, Factorized) for layer in model)
