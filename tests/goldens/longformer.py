"""Golden numbers of transformers' Longformer and RoBERTa, tiny and random; see
make_goldens.py, which writes them."""

import json
import pathlib
import tempfile

import numpy as np
import tokenizers
import torch
import transformers

BOS, PAD, EOS, VOCAB = 0, 1, 2, 31
SIZES = dict(
  vocab_size=VOCAB,
  hidden_size=12,
  intermediate_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=34,
  type_vocab_size=2,
  layer_norm_eps=1e-5,
  pad_token_id=PAD,
  bos_token_id=BOS,
  eos_token_id=EOS,
  sep_token_id=EOS,
  num_labels=3,
)
NONE = ()
# Windows of the layers, length, and for each row: padding tokens, tokens that
# are masked though they are no padding, global tokens.
CASES = {
  'mixed_windows': (
    (4, 8),
    21,
    [
      (NONE, NONE, (0,)),
      (NONE, NONE, (3, 5, 6, 20)),  # near each other, and at the end
      (NONE, NONE, NONE),
    ],
  ),
  'right_padding': (
    (4, 8),
    24,
    [(range(13, 24), NONE, (0, 12)), (range(23, 24), NONE, (1, 23))],
  ),
  'left_padding': (
    (8, 4),
    19,
    [(range(7), NONE, (7, 18)), (range(2), NONE, (2, 3, 10))],
  ),
  'middle_padding': (
    (4, 4),
    22,
    [
      ((5, 6, 7, 8, 9, 10, 15), NONE, (4, 16)),
      ((0, 12), (3, 13, 21), (1, 3, 14)),
    ],
  ),
  'window_over_length': (
    (32, 16),
    7,
    [(NONE, NONE, (2,)), ((5, 6), NONE, (4,))],
  ),
  'no_globals': ((8, 4), 17, [(NONE, NONE, NONE), ((16,), NONE, NONE)]),
  'one_token': ((4, 4), 1, [(NONE, NONE, NONE), (NONE, NONE, (0,))]),
}
# All gradients of these, of the others that of the token embeddings.
ALL_GRADIENTS = ('mixed_windows', 'middle_padding', 'no_globals')

HEADS = {
  'pooler': 'Model',
  'masked_lm': 'ForMaskedLM',
  'sequence_classification': 'ForSequenceClassification',
  'token_classification': 'ForTokenClassification',
  'question_answering': 'ForQuestionAnswering',
  'multiple_choice': 'ForMultipleChoice',
}


def randomise(module, seed=0):
  """Norms and biases start as 1 and 0, which would hide mistakes."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_scale = 'norm' in name.lower() and name.endswith('weight')
      parameter.copy_(is_scale + (0.2 if parameter.ndim == 1 else 0.3) * noise)
  return module.eval()


def config_text(config, **changes):
  return np.array(
    json.dumps(
      json.loads(config.to_json_string(use_diff=False)) | changes,
      sort_keys=True,
    )
  )


def state_of(model, prefix='weights/'):
  """Weights by name, without the read-outs that are tied to the embedding."""
  return {
    f'{prefix}{name}': value.numpy()
    for name, value in model.state_dict().items()
    if not name.startswith('lm_head.decoder')
  }


def draw(rng, length, rows):
  tokens = rng.integers(3, VOCAB, (len(rows), length))
  mask = np.ones_like(tokens)
  global_mask = np.zeros_like(tokens)
  for row, (padding, masked, global_tokens) in enumerate(rows):
    tokens[row, list(padding)] = PAD
    mask[row, [*padding, *masked]] = 0
    global_mask[row, list(global_tokens)] = 1
  return tokens, mask, global_mask


def encoder():
  """Hidden states and gradients of LongformerModel over `CASES`."""
  rng = np.random.default_rng(0)
  state = arrays = None
  for case, (windows, length, rows) in CASES.items():
    config = transformers.LongformerConfig(
      **SIZES, attention_window=list(windows)
    )
    model = transformers.LongformerModel(config, add_pooling_layer=False)
    if state is None:
      state = randomise(model).state_dict()
      arrays = {'config': config_text(config)} | state_of(model)
    model.load_state_dict(state)
    model.eval()
    tokens, mask, global_mask = draw(rng, length, rows)
    types = rng.integers(0, 2, tokens.shape)
    hidden = model(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask),
      global_attention_mask=torch.tensor(global_mask),
      token_type_ids=torch.tensor(types),
    ).last_hidden_state
    cotangent = rng.standard_normal(hidden.shape).astype(np.float32)
    cotangent *= mask[..., None]
    hidden.backward(torch.tensor(cotangent))
    arrays |= {
      f'{case}/windows': np.array(windows),
      f'{case}/tokens': tokens.astype(np.int32),
      f'{case}/mask': mask.astype(np.int8),
      f'{case}/global_mask': global_mask.astype(np.int8),
      f'{case}/types': types.astype(np.int8),
      f'{case}/hidden': hidden.detach().numpy(),
      f'{case}/cotangent': cotangent,
    }
    for name, parameter in model.named_parameters():
      wanted = case in ALL_GRADIENTS or 'word_embeddings' in name
      # Without a global token the global projections take no part.
      if wanted and parameter.grad is not None:
        arrays[f'{case}/gradient/{name}'] = parameter.grad.numpy()
  return arrays


def pairs(rng, *lengths):
  """Rows <s> a </s></s> b </s>, padded; lengths of a and b."""
  rows = [
    [BOS, *rng.integers(3, VOCAB, a), EOS, EOS, *rng.integers(3, VOCAB, b), EOS]
    for a, b in lengths
  ]
  longest = max(map(len, rows))
  return np.array([row + [PAD] * (longest - len(row)) for row in rows])


def heads(kind):
  """Every head's output, with its own global tokens and with given ones."""
  longformer = kind == 'Longformer'
  windows = {'attention_window': [4, 8]} if longformer else {}
  config = getattr(transformers, f'{kind}Config')(**SIZES, **windows)
  # transformers' eager attention is its definition.
  config._attn_implementation = 'eager'
  rng = np.random.default_rng(1)
  tokens = pairs(rng, (3, 9), (5, 12), (1, 2))
  global_mask = rng.integers(0, 2, tokens.shape)
  arrays = {
    'config': config_text(config),
    'tokens': tokens.astype(np.int32),
    'global_mask': global_mask.astype(np.int8),
  }
  base = None
  for head, suffix in HEADS.items():
    config.num_labels = 2 if head == 'question_answering' else 3
    model = randomise(getattr(transformers, kind + suffix)(config))
    inner = model if head == 'pooler' else getattr(model, kind.lower())
    if base is None:
      base = {
        name: value
        for name, value in inner.state_dict().items()
        if not name.startswith('pooler')
      }
      arrays |= {f'weights/base/{n}': value for n, value in base.items()}
    inner.load_state_dict(base, strict=False)
    for name, value in state_of(model, '').items():
      if name.removeprefix(f'{kind.lower()}.') not in base:
        arrays[f'weights/{head}/{name}'] = value
    inputs = tokens[:, None] if head == 'multiple_choice' else tokens
    globals_ = global_mask.reshape(inputs.shape)
    calls = {'given': {'global_attention_mask': torch.tensor(globals_)}}
    calls = calls | {'default': {}} if longformer else {'default': {}}
    for name, more in calls.items():
      with torch.no_grad():
        out = model(
          torch.tensor(inputs),
          attention_mask=torch.tensor(inputs != PAD).long(),
          **more,
        )
      if head == 'pooler':
        out = out.pooler_output
      elif head == 'question_answering':
        out = torch.stack([out.start_logits, out.end_logits])
      else:
        out = out.logits
      arrays[f'{head}/{name}'] = out.numpy()
  return {
    name: value.numpy() if isinstance(value, torch.Tensor) else value
    for name, value in arrays.items()
  }


TEXTS = [
  'Long documents, longer contexts: "windows" and globals.',
  '  two  spaces, a\ttab and\n\na newline ',
  "it's naïve — 日本語 ☃",
  'a <mask> token',
  '',
  ['what is it?', 'a long document about it'],
]


def tokenizer():
  """RoBERTa's tokenizer over a small vocabulary of its own."""
  special = ['<s>', '<pad>', '</s>', '<unk>']
  bpe = tokenizers.ByteLevelBPETokenizer()
  words = ' '.join(filter(str.isascii, map(str, TEXTS))) * 3
  bpe.train_from_iterator([words], 300, special_tokens=special)
  bpe.add_special_tokens(['<mask>'])
  with tempfile.TemporaryDirectory() as folder:
    bpe.save_model(folder)
    texts = {
      name: (pathlib.Path(folder) / name).read_text()
      for name in ('vocab.json', 'merges.txt')
    }
    # <mask> stands last, and save_model leaves added tokens out.
    vocabulary = json.loads(texts['vocab.json'])
    vocabulary['<mask>'] = len(vocabulary)
    texts['vocab.json'] = json.dumps(vocabulary)
    (pathlib.Path(folder) / 'vocab.json').write_text(texts['vocab.json'])
    # As in the files of roberta-base: a mask swallows the space before it.
    mask = tokenizers.AddedToken('<mask>', lstrip=True)
    theirs = transformers.RobertaTokenizer.from_pretrained(
      folder, mask_token=mask
    )
    ids = [
      theirs(*(text if isinstance(text, list) else [text])).input_ids
      for text in TEXTS
    ]
  texts |= {'texts': json.dumps(TEXTS), 'ids': json.dumps(ids)}
  return {name: np.array(text) for name, text in texts.items()}


def files():
  """(name of a file, its arrays)."""
  yield 'longformer_encoder', encoder()
  yield 'longformer_heads', heads('Longformer')
  yield 'roberta_heads', heads('Roberta')
  yield 'roberta_tokenizer', tokenizer()
