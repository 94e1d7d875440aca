"""The model card of an export: what the model is, how to load it, what it has read, and its recipe."""

from __future__ import annotations

from hopescale.checkpoint.manifest import Manifest
from hopescale.common.units import format_count
from hopescale.config.model_shape import by_period, mixer_counts
from hopescale.config.schema import RunConfig, SourceConfig
from hopescale.cost.params import count_params

_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [hope, nested-learning, hopescale]
---

# {name}

A language model of {total} parameters, trained by hopescale {version}: {layers} blocks of {mixer} and {num_levels}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
inputs = tokenizer(["A prompt"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40)))
```

{tokenizer}
What the model has read so far is its `past_key_values`; a batch is padded on the left.

## Levels

| level | hidden width | updated every ... steps |
|---|---|---|
{levels}

## What it has read

Step {step} of {steps}, {tokens} tokens in sequences of {seq_len}. The order of the data is a function of its seed and
of the step, so this is also the position in it.

| source | weight | what |
|---|---|---|
{sources}

Data seed {seed}; fingerprint of the data `{data}`.

## Recipe

```yaml
{recipe}```
"""


def model_card(manifest: Manifest, config: RunConfig, recipe: str, tokenizer: str, *, own_code: bool) -> str:
    """Write a model card: `recipe` is the config as YAML, `tokenizer` a sentence about the tokenizer."""
    levels = by_period(config.model.cms.levels)
    kinds = {
        "self_modifying": "self-modifying memories",
        "attention": "softmax attention",
        "linear_attention": "linear memories",
        "titans": "memories with attention",
        "ttt": "memories of test-time training",
    }
    mixers = [mixer for mixer, _ in mixer_counts(config.model)]
    return _TEXT.format(
        name=config.name,
        trust=", trust_remote_code=True" if own_code else "",
        total=format_count(count_params(config.model)["total"]),
        version=manifest.versions.get("hopescale", ""),
        layers=config.model.num_layers,
        mixer=" and ".join(dict.fromkeys(kinds[mixer.kind] for mixer in mixers)),
        num_levels=f"{len(levels)} level{'s' if len(levels) > 1 else ''}",
        tokenizer=tokenizer,
        levels="\n".join(f"| {name} | {level.d_ff} | {level.update_every_steps} |" for name, level in levels),
        step=manifest.step,
        steps=config.train.steps,
        tokens=f"{manifest.progress['tokens_seen']:,}",
        seq_len=config.train.seq_len,
        sources="\n".join(
            f"| {name} | {source.weight:g} | {_origin(source)} |" for name, source in config.data.sources.items()
        ),
        seed=config.data.seed,
        data=manifest.identity.get("data", "unknown"),
        recipe=recipe,
    )


def _origin(source: SourceConfig) -> str:
    """Describe the data of a source, for a row of a table."""
    if source.path is not None:
        return source.path
    return f"suite: {source.suite.task}" if source.synthetic is None else f"synthetic: {source.synthetic.task}"
