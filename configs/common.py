"""What the configs share: every key with its default, arguments, windows."""

import dataclasses
import math

import ml_collections

from longjax import training
from longjax.models import char_lm


def make_config(task: str = 'language_modelling') -> ml_collections.ConfigDict:
  """A config with every key there is, at its default, ready to be changed.

  Stays locked: a key that is not in the settings of the task (see
  `longjax.training.tasks`) is refused, but for the model's arguments.
  """
  settings = training.default_settings(task)
  config = ml_collections.ConfigDict(dataclasses.asdict(settings)).lock()
  config.model.unlock()
  return config


def parse_arg(arg: str | None, **defaults):
  """The argument after a config file's colon, 'large,runlocal' or 'steps=10'.

  Args:
    arg: comma-separated names, each of which becomes True, and name=value pairs
      whose values take the type of the default. None is ''.
    **defaults: the names there are.

  Returns:
    A namespace of all names, as a ConfigDict.

  Raises:
    ValueError: for a name that there is not, or a value of another type.
  """
  values = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, equals, text = part.partition('=')
    if name not in defaults:
      raise ValueError(
        f'config argument {name!r} is not one of {", ".join(defaults)}'
      )
    kind = type(defaults[name])
    if kind is bool and not equals:
      values[name] = True
    elif kind is bool or not equals:
      raise ValueError(
        f'config argument {part!r}: '
        + ('a plain name is wanted' if kind is bool else 'a value is wanted')
      )
    else:
      try:
        values[name] = kind(text)
      except ValueError:
        raise ValueError(
          f'config argument {part!r}: {name} is a {kind.__name__}'
        ) from None
  return ml_collections.ConfigDict(values)


def doubling_windows(bottom: int, top: int, num_layers: int) -> tuple[int, ...]:
  """Windows that double from the bottom layer's to the top layer's.

  Layers are dealt evenly to the powers of two between, the remaining ones to
  the upper powers: 32 to 512 over 12 layers is 2 of 32, 2 of 64, 2 of 128, 3 of
  256 and 3 of 512. The paper does not publish its windows between the two ends;
  these have the mean 229 that its ablation rounds to "fixed w = 230".

  Raises:
    ValueError: unless top is bottom times a power of two, and there are layers
      enough.
  """
  doublings = round(math.log2(top / bottom))
  if bottom << max(doublings, 0) != top or num_layers <= doublings:
    raise ValueError(
      f'no doubling from {bottom} to {top} over {num_layers} layers'
    )
  each, more = divmod(num_layers, doublings + 1)
  windows = []
  for power in range(doublings + 1):
    count = each + (power > doublings - more)
    windows += [bottom << power] * count
  return tuple(windows)


def dilated_heads(
  gaps: tuple[int, ...], num_heads: int = 8, num_dilated: int = 2
) -> tuple[tuple[int, ...], ...]:
  """Dilation of each head of each layer, the last `num_dilated` heads dilated.

  Args:
    gaps: for each layer how many characters are skipped between two keys; the
      paper's Table 12 counts so, its 0 is our dilation 1.
    num_heads: of each layer.
    num_dilated: how many of them are dilated; the paper says two, not which.
  """
  plain = num_heads - num_dilated
  return tuple((1,) * plain + (gap + 1,) * num_dilated for gap in gaps)


# Longformer's five phases (Table 12): sequences in a batch, and steps of the
# small and of the large model.
_BATCH_SIZES = (32, 32, 16, 16, 16)
_STEPS = {
  12: (430_000, 50_000, 50_000, 35_000, 5_000),
  30: (350_000, 25_000, 10_000, 5_000, 5_000),
}
# Characters skipped between the keys of the dilated heads, bottom layer first.
_GAPS = {
  12: (0,) * 6 + (1,) * 2 + (2,) * 2 + (3,) * 2,
  30: (0,) * 15 + (1,) * 5 + (2,) * 5 + (3,) * 5,
}


def longformer_stages(num_layers: int) -> tuple[dict, ...]:
  """The five phases of the paper's small (12) or large (30 layers) model."""
  stages = []
  for phase, (batch_size, steps) in enumerate(
    zip(_BATCH_SIZES, _STEPS[num_layers], strict=True)
  ):
    stages.append(
      dict(
        # The last phase is as long as the authors' GPUs allowed.
        length=min(2048 << phase, 23_040),
        batch_size=batch_size,
        steps=steps,
        learning_rate=2.5e-4 / 2**phase,
        warmup_steps=min(steps // 10, 10_000),
        schedule='constant',
        windows=doubling_windows(32 << phase, 512 << phase, num_layers),
        dilations=dilated_heads(_GAPS[num_layers]),
      )
    )
  return tuple(stages)


def longformer_config(arg, *, data: str) -> ml_collections.ConfigDict:
  """Longformer's character LM on `data`; arg of `parse_arg`."""
  if arg.large and (arg.small or arg.budget):
    raise ValueError('of small, large and budget only one can be had')
  config = make_config()
  config.data.name = data
  config.pattern = 'sliding_window'
  if arg.runlocal:
    config.model = modern_model(dropout_rate=0.1)
    run_local(
      config,
      stages=(
        local_stage(windows=(16, 32), dilations=((1, 1, 1, 1), (1, 1, 2, 2))),
      ),
    )
  elif arg.budget:
    config.model = modern_model(dropout_rate=0.2)
    budget(
      config,
      stages=[
        dict(windows=doubling_windows(32, 512, 12)),
        dict(windows=doubling_windows(128, 2048, 12)),
      ],
    )
  else:
    num_layers = 30 if arg.large else 12
    preset = char_lm.char_lm_large if arg.large else char_lm.char_lm_small
    config.model = preset(dtype='bfloat16', remat=True)
    del config.model.vocab_size  # the text's own
    config.data.vocab = 'compact' if data == 'enwik8' else 'letters'
    config.stages = longformer_stages(num_layers)
    config.optimizer.update(name='adamw', weight_decay=0.01, clip_norm=0.25)
    config.evaluation.update(
      length=32_256,
      stride=512,
      batch_size=4,
      every=10_000,
      validation_characters=500_000,
    )
    config.log_every = 100
    config.checkpoint_every = 1000
  return config


def modern_model(**overrides) -> dict:
  """DecoderLM's arguments for the recipes that are ours: 12 layers of 512."""
  return (
    dict(
      num_layers=12,
      features=512,
      num_heads=8,
      position='rope',
      norm='rms',
      qk_norm=True,
      mlp='relu2',
      zero_init_outputs=True,
    )
    | overrides
  )


def budget(
  config: ml_collections.ConfigDict,
  *,
  stages: list[dict],
  lengths: tuple[int, int] = (1024, 4096),
) -> None:
  """Two stages meant for about 10 minutes of one Hopper GPU, all told.

  65,536 characters in a step: 2 epochs of enwik8's training split, some 40 of
  the prefix that fits on a small disk, hence the dropout.
  """
  config.model.dtype = 'bfloat16'
  config.optimizer.update(
    name='muon', weight_decay=0.05, clip_norm=1.0, b2=0.95
  )
  config.stages = tuple(
    dict(
      length=length,
      batch_size=65_536 // length,
      steps=steps,
      learning_rate=learning_rate,
      warmup_steps=100,
      schedule=schedule,
      **stage,
    )
    for stage, length, steps, learning_rate, schedule in zip(
      stages,
      lengths,
      (1800, 1000),
      (3e-3, 2e-3),
      ('constant', 'linear'),
      strict=True,
    )
  )
  config.evaluation.update(
    length=4096,
    stride=1024,
    batch_size=16,
    every=500,
    validation_characters=250_000,
  )
  config.checkpoint_every = 500


def local_stage(**keys) -> dict:
  """A stage small enough for `run_local`."""
  return (
    dict(
      length=256,
      batch_size=8,
      steps=60,
      learning_rate=3e-3,
      warmup_steps=10,
      schedule='linear',
    )
    | keys
  )


def run_local(config: ml_collections.ConfigDict, *, stages) -> None:
  """Shrinks a run to about a minute on two CPU cores: a test, not a result."""
  config.data.name = 'python_source'
  config.data.vocab = 'bytes'
  config.model.update(num_layers=2, features=64, num_heads=4)
  config.stages = stages
  config.log_every = 10
  config.checkpoint_every = 50
  config.evaluation.update(
    length=256,
    stride=128,
    batch_size=8,
    test_characters=16_384,
  )


def summaries_run_local(config: ml_collections.ConfigDict) -> None:
  """Shrinks a run of summarization to a minute or two on two CPU cores."""
  config.data.update(name='python_modules', vocab_size=1024, buckets=(256,))
  config.model = dict(
    num_encoder_layers=2,
    num_decoder_layers=2,
    features=64,
    num_encoder_heads=4,
    num_decoder_heads=4,
    max_positions=1024,
    max_target_positions=64,
    max_globals=1,
  )
  config.stages = tuple(
    dict(
      length=length,
      batch_size=8,
      steps=steps,
      learning_rate=4e-3,
      warmup_steps=10,
      windows=32,
      **keys,
    )
    for length, steps, keys in (
      (128, 120, dict(objective='opening', target_length=40)),
      (1024, 40, dict(schedule='linear')),
    )
  )
  config.target_length = 64
  config.optimizer.update(name='muon', weight_decay=0.01, clip_norm=1.0)
  config.evaluation.update(
    lengths=(256, 1024),
    batch_size=8,
    num_beams=2,
    max_length=40,
    min_length=0,
    every=80,
    validation_papers=8,
    test_papers=16,
  )
  config.log_every = 10
  config.checkpoint_every = 50
  config.tensorboard = False


VARIANTS = (
  'vanilla',
  'window only',
  'mask only',
  'ceiling only',
  'LM-Infinite',
  'StreamingLLM',
  'Self-Extend',
  'truncation',
  'independent blocks',
)


def measurements(
  trained_length: int, start: int = 10
) -> ml_collections.ConfigDict:
  """What `main.py --mode=measure` does to a model.

  Args:
    trained_length: L, LM-Infinite's window and distance ceiling.
    start: G, how many of the first tokens stay visible.
  """
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = ml_collections.ConfigDict(
    dict(
      # A folder in Hugging Face's format, a llama2.c .bin, or a run's workdir.
      path='',
      tokenizer='',  # if it is not in the folder
      dtype='',  # of the weights; '' for what the model says
      trained_length=trained_length,
      start=start,
    )
  )
  # A plain or .xz file; of a run by default its test split. Its documents
  # follow each other, and so do the texts that are measured; or text i begins
  # with document i * stride.
  config.text = ml_collections.ConfigDict(
    dict(path='', separator='<|endoftext|>', stride=0)
  )
  config.variants = VARIANTS
  # Lengths of 0, no samples, no documents: not measured.
  config.loss_by_position = ml_collections.ConfigDict(
    dict(length=8 * trained_length, documents=10, chunk=trained_length)
  )
  config.streaming = ml_collections.ConfigDict(
    dict(length=0, chunk=trained_length)
  )
  for task in ('passkey', 'key_value'):
    config[task] = ml_collections.ConfigDict(
      dict(
        lengths=(0,),
        depths=(0.1, 0.5, 0.9),
        samples=0,
        # k of LM-Infinite's top-k, measured beside the variants; 0: not.
        middle_keys=0,
        middle_first_layer=4,
      )
    )
  config.overlap = ml_collections.ConfigDict(
    dict(milestones=(trained_length,), tokens=100, documents=0)
  )
  return config.lock()


def paper_measurements(
  trained_length: int, start: int = 10
) -> ml_collections.ConfigDict:
  """LM-Infinite's table 1 (to 32K), table 2's lengths and table 3."""
  config = measurements(trained_length, start)
  doubled = tuple(trained_length * 2**i for i in range(4))
  with config.unlocked():
    config.loss_by_position.length = 32768
    config.passkey.update(lengths=doubled[:3], samples=100)
    config.key_value.update(lengths=doubled[:2], samples=100)
    config.overlap.update(milestones=doubled, documents=100)
  return config
