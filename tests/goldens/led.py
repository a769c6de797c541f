"""Golden numbers of transformers' LED and BART, tiny and random, and of what
they generate; see make_goldens.py, which writes them."""

import json

import numpy as np
import torch
import transformers
from longformer import BOS, EOS, PAD, VOCAB, config_text, draw, randomise

SIZES = dict(
  vocab_size=VOCAB,
  d_model=12,
  encoder_layers=2,
  decoder_layers=2,
  encoder_ffn_dim=14,
  decoder_ffn_dim=16,
  encoder_attention_heads=2,
  decoder_attention_heads=3,
  pad_token_id=PAD,
  bos_token_id=BOS,
  eos_token_id=EOS,
  decoder_start_token_id=EOS,
  forced_eos_token_id=None,
)
NONE = ()
# As of longformer.CASES: the rows of the encoder's input.
CASES = {
  'first_token': (
    (4, 8),
    21,
    [(NONE, NONE, (0,)), (range(13, 21), NONE, (0,))],
  ),
  'ragged_globals': (
    (8, 4),
    18,
    [(NONE, NONE, (0, 3, 17)), (range(9, 18), (4,), (8,))],
  ),
  'no_globals': ((4, 4), 9, [(NONE, NONE, NONE), ((7, 8), NONE, NONE)]),
}
TARGET = 7

SEARCHES = {
  'greedy': {},
  'greedy_ngrams': {'no_repeat_ngram_size': 2, 'min_length': 8},
  'greedy_penalty': {'repetition_penalty': 1.7},
  'greedy_forced': {'forced_bos_token_id': 5, 'forced_eos_token_id': EOS},
  'beam2': {'num_beams': 2},
  'beam4': {'num_beams': 4},
  'beam4_long': {'num_beams': 4, 'length_penalty': 2.0},
  'beam4_short': {'num_beams': 4, 'length_penalty': -1.0},
  'beam4_early': {'num_beams': 4, 'early_stopping': True},
  'beam4_never': {
    'num_beams': 4,
    'early_stopping': 'never',
    'length_penalty': 1.5,
  },
  'beam2_ngrams': {
    'num_beams': 2,
    'no_repeat_ngram_size': 3,
    'min_length': 9,
    'length_penalty': 2.0,
    'early_stopping': True,
  },
  'beam4_forced': {
    'num_beams': 4,
    'forced_bos_token_id': BOS,
    'forced_eos_token_id': EOS,
    'repetition_penalty': 1.3,
  },
}
MAX_LENGTH = 16


def state_of(model):
  kept = ('shared', 'positions', 'layers', 'layernorm', 'final_logits_bias')
  return {
    f'weights/{name}': value.numpy()
    for name, value in model.state_dict().items()
    if any(part in name for part in kept)
  }


def make(config):
  # transformers' eager attention is its definition.
  config._attn_implementation = 'eager'
  model = randomise(getattr(transformers, config.architectures[0])(config))
  with torch.no_grad():
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(model.final_logits_bias.shape, generator=generator)
    # Texts that end now and then.
    bias[0, EOS] += 2.6
    model.final_logits_bias.copy_(bias)
  return model


def led():
  rng = np.random.default_rng(2)
  arrays = None
  for case, (windows, length, rows) in CASES.items():
    config = transformers.LEDConfig(
      **SIZES,
      attention_window=list(windows),
      max_encoder_position_embeddings=24,
      max_decoder_position_embeddings=MAX_LENGTH,
      architectures=['LEDForConditionalGeneration'],
    )
    model = make(config)
    if arrays is None:
      arrays = {'config': config_text(config)} | state_of(model)
    tokens, mask, global_mask = draw(rng, length, rows)
    target = rng.integers(3, VOCAB, (len(rows), TARGET))
    target[:, 0] = EOS
    logits = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask),
      global_attention_mask=torch.tensor(global_mask),
      decoder_input_ids=torch.tensor(target),
    ).logits
    cotangent = rng.standard_normal(logits.shape).astype(np.float32)
    logits.backward(torch.tensor(cotangent))
    arrays |= {
      f'{case}/windows': np.array(windows),
      f'{case}/tokens': tokens.astype(np.int32),
      f'{case}/mask': mask.astype(np.int8),
      f'{case}/global_mask': global_mask.astype(np.int8),
      f'{case}/target': target.astype(np.int32),
      f'{case}/logits': logits.detach().numpy(),
      f'{case}/cotangent': cotangent,
    }
    for name, parameter in model.named_parameters():
      wanted = case == 'ragged_globals' or 'shared' in name
      if wanted and parameter.grad is not None:
        arrays[f'{case}/gradient/{name}'] = parameter.grad.numpy()
  return arrays | searches(model, rng)


def searches(model, rng):
  """Texts of four rows, of different lengths in most searches."""
  lengths = (21, 13, 17, 6)
  rows = [(range(length, 21), NONE, (0,)) for length in lengths]
  tokens, mask, global_mask = draw(rng, 21, rows)
  arrays = {
    'searches': np.array(json.dumps(SEARCHES)),
    'search/tokens': tokens.astype(np.int32),
  }
  for name, settings in SEARCHES.items():
    out = model.generate(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask),
      max_length=MAX_LENGTH,
      do_sample=False,
      return_dict_in_generate=True,
      output_scores=True,
      global_attention_mask=torch.tensor(global_mask),
      **{'num_beams': 1} | settings,
    )
    arrays[f'search/{name}/texts'] = out.sequences.numpy().astype(np.int32)
    if 'beam' in name:
      arrays[f'search/{name}/scores'] = out.sequences_scores.numpy()
  return arrays


def bart():
  rng = np.random.default_rng(3)
  config = transformers.BartConfig(
    **SIZES,
    max_position_embeddings=24,
    scale_embedding=True,
    architectures=['BartForConditionalGeneration'],
  )
  model = make(config)
  tokens, mask, _ = draw(
    rng, 17, [(NONE, NONE, NONE), (range(11, 17), NONE, NONE)]
  )
  target = rng.integers(3, VOCAB, (2, TARGET))
  with torch.no_grad():
    logits = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask),
      decoder_input_ids=torch.tensor(target),
    ).logits
  return {
    'config': config_text(config),
    'tokens': tokens.astype(np.int32),
    'target': target.astype(np.int32),
    'logits': logits.numpy(),
  } | state_of(model)


def files():
  """(name of a file, its arrays)."""
  yield 'led', led()
  yield 'bart', bart()
