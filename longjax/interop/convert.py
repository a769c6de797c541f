"""A longer model from a folder with a shorter one, into another folder.

  python -m longjax.interop.convert roberta-base longformer-base-4096 \
    --length=4096 --window=512

`longjax.interop.lengthen` as a command. Exit code: 0 when done, 1 for an error
in one line, 2 for a mistake on the command line.
"""

import argparse
import sys

from longjax.interop.longer import lengthen


def main(arguments=None):
  parser = argparse.ArgumentParser(
    prog='python -m longjax.interop.convert',
    description='Makes a longer model from a RoBERTa or Longformer.',
  )
  parser.add_argument('source', help='folder of the model')
  parser.add_argument('target', help='folder to write')
  parser.add_argument(
    '--length', type=int, required=True, help='positions of the new model'
  )
  parser.add_argument(
    '--window', type=int, help='keys seen on both sides together'
  )
  given = parser.parse_args(arguments)
  try:
    lengthen(given.source, given.target, given.length, given.window)
  except (ValueError, OSError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  print(f'{given.target}: {given.length} positions')
  return 0


if __name__ == '__main__':
  sys.exit(main())
