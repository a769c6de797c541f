"""Hugging Face's Longformer and LED behind `worker.serve`.

Runs in the environment that `make goldens` builds; started by cpu_models.py.
"""

import os

import torch
import transformers
import worker

torch.set_num_threads(len(os.sched_getaffinity(0)))


def make_config(spec):
  window = [spec['window']] * spec['layers']
  if spec['model'] == 'longformer':
    return transformers.LongformerConfig(
      vocab_size=spec['vocab_size'],
      hidden_size=spec['features'],
      num_hidden_layers=spec['layers'],
      num_attention_heads=spec['heads'],
      intermediate_size=spec['mlp_features'],
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      max_position_embeddings=spec['length'] + 2,
      type_vocab_size=1,
      layer_norm_eps=1e-5,
      attention_window=window,
    )
  return transformers.LEDConfig(
    vocab_size=spec['vocab_size'],
    d_model=spec['features'],
    encoder_layers=spec['layers'],
    decoder_layers=spec['layers'],
    encoder_attention_heads=spec['heads'],
    decoder_attention_heads=spec['heads'],
    encoder_ffn_dim=spec['mlp_features'],
    decoder_ffn_dim=spec['mlp_features'],
    dropout=0.0,
    max_encoder_position_embeddings=spec['length'],
    max_decoder_position_embeddings=1024,
    attention_window=window,
  )


CLASSES = {
  'longformer': transformers.LongformerForSequenceClassification,
  'led': transformers.LEDForConditionalGeneration,
}


def setup(spec):
  """A case: 'write' the model's folder, 'forward' or 'training step'."""
  cls = CLASSES[spec['model']]
  if spec['mode'] == 'write':
    torch.manual_seed(spec['seed'])
    cls(make_config(spec)).save_pretrained(spec['folder'])
    return dict
  model = cls.from_pretrained(spec['folder'])
  tokens, targets = worker.make_tokens(spec)
  arguments = {'input_ids': torch.from_numpy(tokens)}
  if spec['model'] == 'led':
    arguments |= {'labels': torch.from_numpy(targets), 'use_cache': False}
    # As its documentation asks for; the classifier does so by itself.
    first = torch.zeros_like(arguments['input_ids'])
    first[:, 0] = 1
    arguments['global_attention_mask'] = first
  else:
    arguments['labels'] = torch.ones(1, dtype=torch.long)

  def forward():
    with torch.no_grad():
      return {'logits': model(**arguments).logits}

  if spec['mode'] == 'forward':
    model.eval()
    return forward
  model.train()
  model.gradient_checkpointing_enable(
    gradient_checkpointing_kwargs={'use_reentrant': False}
  )
  # Without effect, so that every step is the same.
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = model(**arguments).loss
    loss.backward()
    optimizer.step()
    results = {'loss': loss.detach()}
    if spec.get('check'):
      results['gradient'] = model.get_input_embeddings().weight.grad
    return results

  return step


if __name__ == '__main__':
  worker.serve(
    setup,
    {'torch': torch.__version__, 'transformers': transformers.__version__},
  )
