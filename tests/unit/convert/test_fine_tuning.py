"""What users of transformers do with an export besides writing text: Trainer, checkpointing, autocast, more tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hopescale.convert.hf_model.modeling_hope import HopeBlock, HopeForCausalLM
from tests.unit.convert.test_modeling_hope import make_pair

TOKENS = torch.randint(0, 40, (2, 19), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS).index_fill(1, torch.arange(5), 1)
MASK[0, :5] = 0


@pytest.fixture
def model() -> HopeForCausalLM:
    return make_pair("all kinds")[1]


def gradients(model: HopeForCausalLM) -> list[Tensor]:
    model.zero_grad()
    model(TOKENS, attention_mask=MASK, labels=TOKENS).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_recomputed_activations_give_the_same_gradients(model, monkeypatch):
    model.train()
    plain, calls = gradients(model), []
    model.gradient_checkpointing_enable()
    forward = HopeBlock.forward
    monkeypatch.setattr(HopeBlock, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    again = gradients(model)
    assert len(calls) == 2 * len(model.blocks)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    assert model(TOKENS).past_key_values is None and model(TOKENS, use_cache=True).past_key_values is not None


def test_autocast_keeps_memories_in_float32(model):
    wanted = model(TOKENS, attention_mask=MASK)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(TOKENS, attention_mask=MASK, labels=TOKENS)
    assert found.logits.dtype == torch.bfloat16
    (where,) = MASK[0].nonzero().T
    error = (found.logits[0, where].float() - wanted.logits[0, where]).norm() / wanted.logits[0, where].norm()
    assert error < 0.05
    states = [state for layer in found.past_key_values.layers for state in layer.items()]
    memories = [tensor for name, tensor in states if name not in ("k", "v", "tail")]
    assert memories and all(memory.dtype == torch.float32 for memory in memories)
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_can_be_added_and_saved(tied: bool, tmp_path: Path):
    model = make_pair("all kinds" if tied else "untied, no padding")[1]
    before, count = model(TOKENS).logits, model.config.vocab_size
    assert (model.head is None) == tied
    model.resize_token_embeddings(count + 100)
    after = model(TOKENS).logits
    assert after.shape[-1] == count + 100
    torch.testing.assert_close(after[..., :count], before)
    weight = (model.embedding if tied else model.head).weight
    torch.testing.assert_close(weight[count + 50], weight[:count].mean(0))
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path)
    new = torch.tensor([[count + 99, 1]])
    torch.testing.assert_close(loaded(new).logits, model(new).logits)
    model.resize_token_embeddings(count)
    torch.testing.assert_close(model(TOKENS).logits, before)


def test_hidden_states_are_the_stream_before_each_block_and_after_the_norm(model):
    found = model(TOKENS, output_hidden_states=True, logits_to_keep=1)
    assert len(found.hidden_states) == len(model.blocks) + 1
    torch.testing.assert_close(found.hidden_states[0], model.embedding(TOKENS))
    logits = found.hidden_states[-1] @ model.embedding.weight.T
    torch.testing.assert_close(logits[:, -1:, : model.config.vocab_size], found.logits)
    as_tuple = model(TOKENS, return_dict=False)
    torch.testing.assert_close(as_tuple[0][:, -1:], found.logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"positions": 3}, TypeError, "knows no argument positions"),
        ({"num_items_in_batch": 3}, TypeError, "knows no argument num_items"),
        ({"output_attentions": True}, ValueError, "no attention weights"),
        ({"position_ids": torch.arange(19)[None] % 7}, ValueError, "texts packed into a row"),
    ],
)
def test_what_would_be_without_effect_is_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model(TOKENS, **arguments)
    places = (MASK.cumsum(1) - 1).clamp_min(0)
    model(TOKENS, attention_mask=MASK, position_ids=places, num_items_in_batch=30, labels=TOKENS)


def test_a_trainer_trains_and_evaluates(tmp_path: Path):
    pytest.importorskip("accelerate")
    model = make_pair("attention")[1]
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows).predictions.shape == (2, 19, model.config.vocab_size)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "repetition_penalty": 1.2},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ],
    ids=["sample", "beams", "sampled beams", "with scores"],
)
def test_modes_of_generation(model, options):
    found = model.eval().generate(TOKENS, attention_mask=MASK, max_new_tokens=3, pad_token_id=0, **options)
    ids = found if isinstance(found, Tensor) else found.sequences
    assert ids.shape == (2 * options.get("num_return_sequences", 1), 22)


def test_modes_that_would_crop_a_state_are_refused(model):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.eval().generate(TOKENS[:1], max_new_tokens=3, prompt_lookup_num_tokens=2)


def test_low_rank_adapters_learn_and_the_rest_stays(model):
    import peft

    layers = ["in_proj", "out_proj", "gate", "up", "down"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(TOKENS, attention_mask=MASK, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in adapted.named_parameters() if not parameter.equal(before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert adapted.generate(input_ids=TOKENS, attention_mask=MASK, max_new_tokens=2).shape == (2, 21)
