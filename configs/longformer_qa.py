"""Longformer fine-tuned to find answers in long texts.

Paper: https://arxiv.org/abs/2004.05150, section 6.1, Tables 7 and 14: TriviaQA
(110,000 questions): the question is global, texts are cut off at 4,096 tokens,
any right span counts; batches of 32, learning rate 3e-5 after 1,000 steps of
warm-up, 5 epochs.

  python -m experiments.main --workdir=runs/triviaqa \
    --config=configs/longformer_qa.py \
    --config.pretrained=longformer-base-4096 --config.data.train=FILE.jsonl

FILE has a JSON object a line, {"id", "question", "context", "answers": {"text":
[...], "answer_start": [...]}}, SQuAD's flat form; without answers where there
is none. Validation and test as of configs/longformer_classification.py.

| argument  | what                                                       |
|-----------|------------------------------------------------------------|
| epochs    | default 5                                                  |
| examples  | of the training split, for the number of steps; default    |
|           | 110,647, TriviaQA's                                        |
| length    | tokens of a question and its text, default 4096            |
| ,runlocal | a small model from nothing and a BPE of its own: a minute  |
|           | on two cores with any FILE: a test, not a result           |

Expected: F1 75.2 on the development set (RoBERTa 74.3); not run by us.
"""

from configs import common, longformer_classification


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(
    arg, epochs=5, examples=110_647, length=4096, runlocal=False
  )
  return longformer_classification.fine_tuning(
    arg,
    'question_answering',
    batch_size=32,
    learning_rate=3e-5,
    warmup_steps=1000,
  )
