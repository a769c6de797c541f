"""A small LED learns from nothing to summarize papers of the ACL.

Paper: https://arxiv.org/abs/2004.05150, section 7 and Figure 3: does a summary
gain from reading more of a paper? The authors fine-tune BART on arXiv's 203,037
papers; this is what 586 papers and half an hour of two CPU cores can show.

The data: scisummnet_acl.jsonl.xz, ACL papers (noisy text of PDFs) with a
summary by hand (`human_summary`; its first line, the title, is dropped). Of 913
records 11 have no abstract, and 142 are left out because their body contains
the first 100 letters of the summary or the abstract, in whatever case and
spacing. By the hash of their ids 586 train, 90 validate and 84 test. The model
is also tested on arXiv papers (arxiv_6records.jsonl.xz,
arxiv49_summarization.jsonl.xz), whose abstracts it has never seen the like of.

  python -m experiments.main --workdir=runs/scisummnet_led \
    --config=configs/scisummnet_led.py:folder=FOLDER_OF_THE_FILES

| argument  | what                                                         |
|-----------|--------------------------------------------------------------|
| folder    | where the three files are                                    |
| ,runlocal | a minute or two on two cores: a test, not a result; without  |
|           | a folder on the modules of Python itself                     |

The model: 2 + 2 layers of 128, windows of 128 tokens, inputs of up to 8,192
tokens, a byte-level BPE of 8,192 tokens trained on the training papers. It
begins with nothing, so two stages teach its decoder to read: the first writes
the opening of pieces of the training papers, 256 tokens long, the second goes
on with spans from anywhere in pieces of 512; the third learns summaries, two
epochs of papers read up to 8,192 tokens (95 in 100 are read whole).

About 3,400 processor seconds in all, half an hour of two quiet cores (not
measured as a whole; from single steps on a busy machine: 1.1 processor seconds
a step of the first stage, 4.6 of the third, 6 to decode four papers).

Expected: none from the paper. What it must show is that ROUGE falls when the
model is given another paper's text, and how it compares with the first three
sentences and with random ones, with intervals (`summaries.json`,
`rouge_by_length.png`); not run by us yet.
"""

import pathlib

from configs import common

FILE = 'scisummnet_acl.jsonl.xz'
LENGTH = 8192


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(arg, folder='', runlocal=False)
  config = common.make_config('summarization')
  config.model = dict(
    num_encoder_layers=2,
    num_decoder_layers=2,
    features=128,
    num_encoder_heads=4,
    num_decoder_heads=4,
    max_positions=LENGTH,
    max_target_positions=320,
    max_globals=1,
  )
  config.stages = (
    stage(256, 16, 600, 4e-3, objective='opening', target_length=128),
    stage(512, 8, 300, 2e-3, objective='span'),
    # Two epochs.
    stage(LENGTH, 4, 294, 2e-3, schedule='linear'),
  )
  config.target_length = 320
  config.optimizer.update(name='muon', weight_decay=0.01, clip_norm=1.0)
  config.evaluation.update(
    lengths=(1024, 4096, LENGTH),
    batch_size=4,
    num_beams=4,
    max_length=256,
    min_length=50,
    no_repeat_ngram=3,
    every=200,
    validation_papers=16,
  )
  config.data.buckets = (2048, 4096, 6144)
  config.log_every = 20
  config.checkpoint_every = 100
  if arg.runlocal:
    common.summaries_run_local(config)
  config.data.opening = 100
  if arg.folder:
    folder = pathlib.Path(arg.folder)
    config.data.name = 'papers'
    config.data.path = str(folder / FILE)
    config.data.fields.update(
      article='sections',
      summary='human_summary',
      abstract='abstract',
      title='title',
    )
    config.data.tests = (
      dict(name='arxiv', path=str(folder / 'arxiv_6records.jsonl.xz')),
      dict(
        name='unarxive',
        path=str(folder / 'arxiv49_summarization.jsonl.xz'),
        fields=dict(article='article', summary='abstract'),
      ),
    )
  return config


def stage(length, batch_size, steps, learning_rate, **keys):
  """One of the three stages, with 64 tokens seen on either side."""
  return dict(
    length=length,
    batch_size=batch_size,
    steps=steps,
    learning_rate=learning_rate,
    warmup_steps=steps // 10,
    windows=64,
    **keys,
  )
