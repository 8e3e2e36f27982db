"""Models of transformers cut between the processes of a gang, against themselves in one."""

import copy

import torch
import torch.distributed as dist
from parity import check
from tensor_cases import full, mesh
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gptkernels as gk

SIZES = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEOX = {**LLAMA, "use_parallel_residual": True}
THREE = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **NO_DROPOUT}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen 3, not tied": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 7}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "Phi": ("PhiForCausalLM", "PhiConfig", LLAMA),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "sliding_window": 7}),
}
REFUSED = {
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 96}),
    "Llama of 3 heads": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, **THREE},
    ),
    "Llama of few keys": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_key_value_heads": 1}),
}


def made(name: str) -> nn.Module:
    import transformers

    model, config, options = {**MODELS, **REFUSED}[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.ndim == 1))
    return made.eval()


def batch() -> Tensor:
    return torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return gk.parallel.tensor_parallel.in_model_order(model, {name: full(grad) for name, grad in grads.items()})


def compare(name: str, accelerated: bool) -> None:
    """Logits, the loss and its gradients in training, with at most twice one process's error"""
    one, tokens = made(name), batch()
    several, truth = copy.deepcopy(one), copy.deepcopy(one).double()
    if accelerated:
        gk.accelerate(several)
    gk.parallel.tensor(several, mesh())
    with torch.no_grad():
        true_logits = truth(tokens).logits
        check(f"{name}: logits", several(tokens).logits, true_logits, one(tokens).logits)
    outputs = [model.train()(tokens, labels=tokens) for model in (truth, one, several)]
    assert (outputs[2].logits is None) == accelerated, "accelerate() gives the loss without logits"
    losses = [each.loss for each in outputs]
    check(f"{name}: loss", losses[2].float(), losses[0], losses[1].float())
    for loss in losses:
        loss.backward()
    truths, ordinary, found = (gradients(model) for model in (truth, one, several))
    assert found.keys() == ordinary.keys()
    for parameter, value in found.items():
        check(f"{name}: gradient of {parameter}", value, truths[parameter], ordinary[parameter])


def with_fsdp(name: str) -> None:
    """Cut between two ranks, and sharded over two more"""
    dp, tp = (dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))[each] for each in ("dp", "tp"))
    one, tokens = made(name), batch()
    several = copy.deepcopy(one)
    gk.accelerate(several)
    gk.parallel.tensor(several, tp)
    for layer in several.model.layers:
        fully_shard(layer, mesh=dp)
    fully_shard(several, mesh=dp)
    losses = [model.train()(tokens, labels=tokens).loss for model in (one, several)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    found = gradients(several)
    for parameter, grad in gradients(one).items():
        torch.testing.assert_close(found[parameter], grad, atol=2e-5 * float(grad.abs().max()), rtol=1e-4)


def generated(name: str) -> tuple[bool, bool, list[int]]:
    """-> whether greedy and sampled tokens are one process's; heads in the caches of keys"""
    one = made(name)
    several = gk.parallel.shard(copy.deepcopy(one), mesh())
    tokens, found = batch()[:, :6], []
    for model, seed in ((one, 3), (several, 3 + dist.get_rank())):
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "pad_token_id": 0}
        torch.manual_seed(seed)
        sampled = model.generate(tokens, do_sample=True, temperature=0.7, **options)
        found.append((model.generate(tokens, do_sample=False, **options), sampled))
    with torch.no_grad():
        cache = several(tokens, use_cache=True).past_key_values
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    return same[0], same[1], [layer.keys.shape[1] for layer in cache.layers]


def by_their_own_means(name: str) -> None:
    """Cut by transformers, as from_pretrained(..., tp_plan="auto") does it, and accelerated after that"""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    one, tokens = made(name), batch()
    several = copy.deepcopy(one)
    plan, _, _ = several._resolve_parallel_plans(DistributedConfig(tp_size=dist.get_world_size()))
    apply_tensor_parallelism(several, mesh(), plan)
    report = gk.accelerate(several)
    assert {row.part for row in report.replaced} >= {"attention", "norm"}
    with torch.no_grad():
        torch.testing.assert_close(several(tokens).logits, one(tokens).logits, atol=1e-4, rtol=1e-4)
    losses = [model.train()(tokens, labels=tokens).loss for model in (one, several)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for parameter, grad in gradients(one).items():
        found = full(several.get_parameter(parameter).grad)
        torch.testing.assert_close(found, grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)


def refusal(name: str) -> str:
    model = made("Llama" if name == "with a hook" else name)
    if name == "with a hook":
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda layer, x, out: 2 * out)
    try:
        gk.parallel.shard(model, mesh())
    except ValueError as error:
        return str(error)
    return ""


def other_weights() -> float:
    """Ranks whose weights differ get those of the first one. -> how far this one's logits are from those"""
    model, first = made("Llama"), made("Llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())
        several = gk.parallel.tensor(model, mesh())
        return float((several(batch()).logits - first(batch()).logits).abs().max())
