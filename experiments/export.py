"""Writes a run's encoder as a folder that transformers loads.

  python -m experiments.export --config=configs/longformer_mlm.py \
    --workdir=runs/longformer_base --folder=FOLDER

The folder gets config.json, model.safetensors and the run's tokenizer.json, and
is what `config.pretrained` and `longjax.interop.load_pretrained` read. Masked
language models train no projection of global tokens: these become copies of the
others, as Longformer's authors do.
"""

import pathlib
import shutil

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import cli
from longjax import interop, training
from longjax.interop.longer import TOKENIZER_FILES, copy_projections
from longjax.models import Longformer

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of the run.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_FOLDER = flags.DEFINE_string('folder', None, 'Where to write.')
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', '', "This one, not the workdir's newest."
)
flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


def export(config, workdir, folder, checkpoint: str = '') -> pathlib.Path:
  """The folder written; see the module.

  Raises:
    ValueError: a run of another kind of model.
    FileExistsError: the folder holds weights already.
    CheckpointError: as of `longjax.training.load`.
  """
  trained = training.load(config, workdir, checkpoint)
  if not isinstance(trained.model, Longformer):
    raise ValueError(
      f'a run of {trained.settings.task} has no encoder to export'
    )
  if trained.model.head_name == 'masked_lm':
    copy_projections(trained.model)
  folder = pathlib.Path(folder)
  made = interop.config_of_longformer(trained.model)
  labels = getattr(trained.task, 'labels', None)
  if labels is not None:
    made['id2label'] = {n: str(label) for n, label in enumerate(labels)}
    made['label2id'] = {str(label): n for n, label in enumerate(labels)}
  interop.save_pretrained(trained.model, folder, made)
  sources = [pathlib.Path(workdir) / 'tokenizer']
  if trained.settings.pretrained:
    sources.append(pathlib.Path(trained.settings.pretrained))
  for source in sources:
    for name in TOKENIZER_FILES:
      if (source / name).exists() and not (folder / name).exists():
        shutil.copy(source / name, folder / name)
  return folder


def main(argv):
  logging.set_verbosity(logging.FATAL)
  try:
    if argv[1:]:
      raise ValueError(f'unknown argument {argv[1]!r}')
    if not _FOLDER.value:
      raise ValueError('--folder is missing')
    print(
      export(_CONFIG.value, _WORKDIR.value, _FOLDER.value, _CHECKPOINT.value)
    )
  except (ValueError, OSError, training.CheckpointError) as e:
    cli.fail(1, str(e))


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parse_flags)
