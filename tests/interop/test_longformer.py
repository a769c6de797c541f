"""Folders of Longformers and RoBERTas, in and out."""

import functools
import json
import logging
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import longjax
from longjax.interop import (
  config_of_longformer,
  lengthen,
  load_pretrained,
  load_tokenizer,
  read_config,
  save_pretrained,
  to_longformer,
)
from longjax.interop.convert import main as convert
from longjax.interop.families import UnsupportedConfig
from longjax.interop.longformer import SUFFIXES
from longjax.models.longformer import Longformer

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ('longformer', 'roberta')
HEADS = tuple(SUFFIXES)


@functools.cache
def goldens(name):
  with np.load(ROOT / 'tests' / 'goldens' / f'{name}.npz') as file:
    return dict(file)


def stored_weights(kind, head, prefix):
  """Tensors as transformers' save_pretrained names them."""
  weights = {}
  for name, value in goldens(f'{kind}_heads').items():
    if name.startswith('weights/base/'):
      weights[prefix + name.removeprefix('weights/base/')] = value
    elif name.startswith(f'weights/{head}/'):
      weights[name.removeprefix(f'weights/{head}/')] = value
  return weights


def write_folder(folder, kind, head, **changes):
  folder.mkdir(parents=True, exist_ok=True)
  config = json.loads(str(goldens(f'{kind}_heads')['config']))
  architecture = kind.capitalize() + SUFFIXES[head]
  config |= {'architectures': [architecture]} | changes
  (folder / 'config.json').write_text(json.dumps(config))
  weights = stored_weights(kind, head, '' if head == 'pooler' else f'{kind}.')
  save_file(weights, folder / 'model.safetensors')
  return weights


def inputs(kind, head):
  tokens = goldens(f'{kind}_heads')['tokens']
  return tokens[:, None] if head == 'multiple_choice' else tokens


def parameters(model):
  return {
    path: np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def assert_same_parameters(a, b):
  a, b = parameters(a), parameters(b)
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=str(path))


def assert_same_output(head, tokens, out, wanted):
  real = tokens != 1
  if head in ('masked_lm', 'token_classification'):
    # transformers' RoBERTa lets padding attend, ours not: it means nothing.
    out, wanted = out[real], wanted[real]
  elif head == 'question_answering':
    out, wanted = out[:, real], wanted[:, real]
  np.testing.assert_allclose(out, wanted, atol=2e-5)


@jax.jit
def run(model, *arguments, **keywords):
  return model(*arguments, **keywords)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('head', HEADS)
def test_loaded_and_saved(kind, head, tmp_path):
  weights = write_folder(tmp_path / 'source', kind, head)
  model = load_pretrained(tmp_path / 'source')
  target = tmp_path / 'target'
  save_pretrained(model, target, read_config(tmp_path / 'source'))
  saved = load_file(target / 'model.safetensors')
  assert saved.keys() == weights.keys()
  for name, value in weights.items():
    np.testing.assert_array_equal(saved[name], value)


@pytest.mark.parametrize(
  'head',
  [
    pytest.param(h, marks=() if h == 'masked_lm' else pytest.mark.full)
    for h in HEADS
  ],
)
def test_roberta_equals_transformers(head, tmp_path):
  """Longformer's heads are compared in tests/models."""
  write_folder(tmp_path, 'roberta', head)
  tokens = inputs('roberta', head)
  out = np.asarray(run(load_pretrained(tmp_path), tokens))
  wanted = goldens('roberta_heads')[f'{head}/default']
  assert_same_output(head, tokens, out, wanted)


LOAD_WITH_TRANSFORMERS = """
import pathlib, sys, numpy as np, torch, transformers
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
  model, report = getattr(transformers, name).from_pretrained(
    folder, output_loading_info=True)
  assert not any(report.values()), report
  tokens = torch.tensor(np.load(folder / 'tokens.npy')).long()
  with torch.no_grad():
    out = model.eval()(tokens, attention_mask=(tokens != 1).long())
  if 'pooler_output' in out: out = out.pooler_output
  elif 'start_logits' in out:
    out = torch.stack([out.start_logits, out.end_logits])
  else: out = out.logits
  np.save(folder / 'out.npy', out.numpy())
"""


def test_transformers_loads_what_is_saved(tmp_path):
  """... of models made here, whose configs are made here too."""
  python = ROOT / '.venv-goldens' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no .venv-goldens (make goldens): no transformers to load with')
  models = {}
  for kind in KINDS:
    for head in HEADS:
      windows = longjax.SlidingWindow(4, 4)
      roberta = kind == 'roberta'
      model = Longformer(
        vocab_size=31,
        num_layers=1,
        features=8,
        num_heads=2,
        patterns=longjax.Full(causal=False) if roberta else windows,
        max_globals=0 if roberta else 16,
        max_positions=30,
        num_types=2,
        num_labels=2 if head == 'question_answering' else 3,
        head=head,
        rngs=nnx.Rngs(7),
      )
      folder = tmp_path / f'{kind}_{head}'
      save_pretrained(model, folder, config_of_longformer(model))
      np.save(folder / 'tokens.npy', inputs(kind, head))
      models[folder] = model
      assert_same_parameters(model, load_pretrained(folder))
  command = [python, '-c', LOAD_WITH_TRANSFORMERS, tmp_path]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-2000:]
  for folder, model in models.items():
    tokens = np.load(folder / 'tokens.npy')
    out = np.asarray(run(model, tokens))
    wanted = np.load(folder / 'out.npy')
    assert_same_output(model.head_name, tokens, out, wanted)


# --- Variants of the format --------------------------------------------------


@pytest.mark.parametrize('twin', [False, True])
def test_bias_and_tied_table_of_the_read_out(twin, tmp_path):
  """Either bias may be there, and the embedding once more."""
  weights = write_folder(tmp_path, 'roberta', 'masked_lm')
  wanted = load_pretrained(tmp_path)
  bias = weights['lm_head.bias']
  if twin:
    weights.pop('lm_head.bias')
  weights['lm_head.decoder.bias'] = bias
  table = 'roberta.embeddings.word_embeddings.weight'
  weights['lm_head.decoder.weight'] = weights[table].copy()
  # A buffer of older files.
  weights['roberta.embeddings.position_ids'] = np.arange(34)[None]
  save_file(weights, tmp_path / 'model.safetensors')
  assert_same_parameters(load_pretrained(tmp_path), wanted)


def test_allenai_folders(tmp_path):
  """Tensors named as RoBERTa's, windows of one side, dilation."""
  config = json.loads(str(goldens('longformer_heads')['config']))
  for name in ('model_type', 'architectures'):
    config.pop(name, None)
  config |= {
    'attention_mode': 'tvm',
    'attention_window': [2, 4],
    'attention_dilation': [1, 1],
    'autoregressive': False,
  }

  def write(**changes):
    (tmp_path / 'config.json').write_text(json.dumps(config | changes))

  write()
  weights = stored_weights('longformer', 'masked_lm', 'roberta.')
  save_file(weights, tmp_path / 'model.safetensors')
  model = load_pretrained(tmp_path)
  assert model.head_name == 'masked_lm'
  tokens = inputs('longformer', 'masked_lm')
  wanted = goldens('longformer_heads')['masked_lm/default']
  np.testing.assert_allclose(run(model, tokens), wanted, atol=2e-5)
  write(attention_dilation=[1, 3])
  dilated = load_pretrained(tmp_path)
  assert dilated.patterns[1] == longjax.SlidingWindow(4, 4, 3)
  write(model_type='longformer')
  with pytest.raises(UnsupportedConfig, match='leaves open .* one side'):
    load_pretrained(tmp_path)
  load_pretrained(tmp_path, patterns=longjax.SlidingWindow(2, 2))
  for name, value in (
    ('attention_mode', 'sliding_chunks_no_overlap'),
    ('autoregressive', True),
  ):
    write(**{name: value})
    with pytest.raises(UnsupportedConfig, match=f'{name}={value!r}'):
      load_pretrained(tmp_path)


def test_another_head(tmp_path, caplog):
  write_folder(tmp_path, 'longformer', 'masked_lm')
  masked_lm = load_pretrained(tmp_path)
  with caplog.at_level(logging.WARNING, 'longjax'):
    model = load_pretrained(
      tmp_path, head='sequence_classification', num_labels=5
    )
  assert 'sequence_classification is new' in caplog.text
  tokens = inputs('longformer', 'sequence_classification')
  assert jax.eval_shape(lambda: model(tokens)).shape == (len(tokens), 5)
  bare = load_pretrained(tmp_path, head=None)
  assert bare.head is None
  ours, theirs = parameters(model), parameters(masked_lm)
  assert {path for path in ours if path not in theirs} == {
    ('head', 'output', 'bias'),
    ('head', 'output', 'kernel'),
  }
  # New, though both heads have one of this name.
  dense = ('head', 'dense', 'kernel')
  assert not np.array_equal(ours[dense], theirs[dense])
  with pytest.raises(ValueError, match="head 'other' is not one of"):
    load_pretrained(tmp_path, head='other')


def test_weights_that_do_not_fit(tmp_path):
  weights = write_folder(tmp_path, 'longformer', 'token_classification')
  name = 'longformer.encoder.layer.1.attention.self.key_global.bias'
  weights['longformer.key_globule'] = weights.pop(name)
  save_file(weights, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=f'missing: {name}; unexpected: .*globu'):
    load_pretrained(tmp_path)


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('roberta', {'is_decoder': True}, 'is_decoder=True is not supported'),
    ('roberta', {'hidden_act': 'relu'}, "hidden_act='relu'"),
    (
      'roberta',
      {'position_embedding_type': 'relative_key'},
      "position_embedding_type='relative_key'",
    ),
    (
      'longformer',
      {'attention_window': [4, 4, 4]},
      'attention_window has 3 entries for 2 layers',
    ),
    ('longformer', {'attention_window': 5}, 'must be even, got 5'),
  ],
)
def test_unsupported_configs(kind, changes, message, tmp_path):
  write_folder(tmp_path, kind, 'masked_lm', **changes)
  with pytest.raises(ValueError, match=message):
    load_pretrained(tmp_path)


def test_what_transformers_lacks_is_not_saved(tmp_path):
  write_folder(tmp_path, 'longformer', 'masked_lm')
  for pattern in (
    longjax.SlidingWindow(4, 4, 2),
    longjax.SlidingWindow(4, 3),
    longjax.Full(causal=False),
  ):
    model = load_pretrained(tmp_path, patterns=pattern)
    with pytest.raises(UnsupportedConfig, match='windows of two equal sides'):
      config_of_longformer(model)
  with pytest.raises(ValueError, match='the config says'):
    save_pretrained(model, tmp_path / 'new', read_config(tmp_path))
  other = load_pretrained(tmp_path, head=None)
  with pytest.raises(ValueError, match='the model has the head None'):
    save_pretrained(other, tmp_path / 'new', read_config(tmp_path))


# --- Longer models -----------------------------------------------------------


def test_longformer_from_roberta(tmp_path):
  write_folder(tmp_path, 'roberta', 'masked_lm')
  roberta = load_pretrained(tmp_path)
  # Not a multiple of the old length, 32.
  model = to_longformer(roberta, 75, window=24)
  tokens = np.random.default_rng(0).integers(3, 31, (2, 13))
  tokens[1, 9:] = 1
  real = tokens != 1
  ours, theirs = (
    np.asarray(run(model, tokens)),
    np.asarray(run(roberta, tokens)),
  )
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-5)
  old, new = parameters(roberta), parameters(model)
  table = ('position_embedding', 'embedding')
  np.testing.assert_array_equal(new[table][:34], old[table])
  np.testing.assert_array_equal(new[table][34:66], old[table][2:])
  np.testing.assert_array_equal(new[table][66:], old[table][2:13])
  for name in ('query', 'key', 'value'):
    for field in ('kernel', 'bias'):
      path = ('layers', 1, 'attention', name, field)
      copy = ('layers', 1, 'attention', f'global_{name}', field)
      np.testing.assert_array_equal(new[copy], old[path])
      np.testing.assert_array_equal(new[path], old[path])
  # Once more, now a Longformer that keeps its windows and global projections.
  model.layers[0].attention.global_key.kernel[...] *= 2
  again = to_longformer(model, 100)
  assert again.patterns == model.patterns and again.max_positions == 100
  old, new = parameters(model), parameters(again)
  np.testing.assert_array_equal(new.pop(table)[:77], old.pop(table))
  for path, value in old.items():
    np.testing.assert_array_equal(new[path], value)


def write_tokenizer(folder):
  arrays = goldens('roberta_tokenizer')
  for name in ('vocab.json', 'merges.txt'):
    (folder / name).write_text(str(arrays[name]))
  return arrays


def test_the_command(tmp_path, capsys):
  source, target = tmp_path / 'roberta', tmp_path / 'longformer'
  labels = {'0': 'sad', '1': 'glad', '2': 'neither'}
  write_folder(source, 'roberta', 'sequence_classification', id2label=labels)
  write_tokenizer(source)
  settings = {'model_max_length': 32, 'tokenizer_class': 'RobertaTokenizer'}
  (source / 'tokenizer_config.json').write_text(json.dumps(settings))
  command = [str(source), str(target), '--length=64', '--window=8']
  assert convert(command) == 0
  assert capsys.readouterr().out == f'{target}: 64 positions\n'
  model = load_pretrained(target)
  assert model.max_positions == 64
  assert model.patterns == (longjax.SlidingWindow(4, 4),) * 2
  assert read_config(target)['id2label'] == labels
  assert load_tokenizer(target).encode('a') == load_tokenizer(source).encode(
    'a'
  )
  written = json.loads((target / 'tokenizer_config.json').read_text())
  assert written == settings | {'model_max_length': 64}
  # Errors are one line.
  for wrong, message in (
    (command, 'exists already'),
    ([str(source), str(target), '--length=31'], 'length 31 is shorter than'),
    ([str(source), str(target), '--length=64', '--window=7'], 'must be even'),
    ([str(tmp_path / 'no'), str(target), '--length=64'], 'no is no folder'),
  ):
    assert convert(wrong) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_other_models_are_not_made_longer(tmp_path):
  model = longjax.DecoderLM(
    **longjax.models.llama(
      vocab_size=7, num_layers=1, features=8, num_heads=2, mlp_features=8
    ),
    patterns=longjax.Full(),
    rngs=nnx.Rngs(0),
  )
  config = longjax.interop.config_of(
    longjax.models.llama(
      vocab_size=7, num_layers=1, features=8, num_heads=2, mlp_features=8
    ),
    max_length=8,
  )
  save_pretrained(model, tmp_path / 'llama', config)
  with pytest.raises(UnsupportedConfig, match="'llama' cannot be made longer"):
    lengthen(tmp_path / 'llama', tmp_path / 'longer', 64)


# --- Tokenizer ---------------------------------------------------------------


def test_byte_level_bpe_equals_transformers(tmp_path):
  arrays = write_tokenizer(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  texts = json.loads(str(arrays['texts']))
  for text, wanted in zip(texts, json.loads(str(arrays['ids'])), strict=True):
    pair = text if isinstance(text, list) else [text]
    got = tokenizer.encode(*pair)
    assert got == wanted
    if len(pair) == 1 and '<mask>' not in text:
      assert tokenizer.decode(got) == text
  assert tokenizer.token('<mask>') == max(
    map(max, json.loads(str(arrays['ids'])))
  )
  with pytest.raises(ValueError, match="no token '<none>'"):
    tokenizer.token('<none>')
  (tmp_path / 'vocab.json').write_text('{')
  with pytest.raises(ValueError, match='holds no byte-level BPE'):
    load_tokenizer(tmp_path)


# --- Real checkpoints: facts of transformers' own integration tests ----------


def real_folder(variable):
  folder = os.environ.get(variable)
  if not folder:
    pytest.skip(f'{variable} names no folder with a real checkpoint')
  return pathlib.Path(folder)


LONG = np.array([[0] + [20920, 232, 328, 1437] * 1000 + [2]])


def test_real_longformer_base_4096():
  """allenai/longformer-base-4096, as safetensors."""
  folder = real_folder('LONGJAX_LONGFORMER_BASE')
  model = load_pretrained(folder, head=None, dtype='float32')
  hidden = model(np.array([[0, 20920, 232, 328, 1437, 2]]))
  wanted = [0.0549, 0.1087, -0.1119, -0.0368, 0.0250]
  np.testing.assert_allclose(hidden[0, 0, -5:], wanted, atol=1e-4)
  global_mask = np.zeros_like(LONG)
  global_mask[:, [1, 4, 21]] = 1
  hidden = np.asarray(model(LONG, global_mask=global_mask), np.float64)
  np.testing.assert_allclose(hidden.sum(), 74585.8594, rtol=1e-4)
  np.testing.assert_allclose(hidden.mean(), 0.0243, atol=1e-4)


def test_real_longformer_base_4096_masked_lm():
  folder = real_folder('LONGJAX_LONGFORMER_BASE')
  model = load_pretrained(folder, head='masked_lm', dtype='float32')
  logits = np.asarray(model(LONG), np.float64)
  top = logits.max(axis=-1)
  lse = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
  chosen = np.take_along_axis(logits, LONG[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose((lse - chosen).mean(), 0.0074, atol=1e-4)
  np.testing.assert_allclose(logits.sum(), -6.1048e8, rtol=1e-4)
  np.testing.assert_allclose(logits.mean(), -3.0348, atol=1e-4)


def test_real_allenai_longformer_base_4096():
  """AllenAI's own release, as safetensors, with vocab.json and merges.txt."""
  folder = real_folder('LONGJAX_LONGFORMER_AI2')
  model = load_pretrained(folder, head=None, dtype='float32')
  tokens = np.array([load_tokenizer(folder).encode(' Hello world!' * 1000)])
  tokens = np.pad(tokens, ((0, 0), (0, 4096)), constant_values=1)[:, :4096]
  global_mask = np.zeros_like(tokens)
  global_mask[:, [1, 4, 21]] = 1
  hidden = np.asarray(model(tokens, global_mask=global_mask), np.float64)
  np.testing.assert_allclose(hidden.sum(), 76193.671875, rtol=1e-4)
