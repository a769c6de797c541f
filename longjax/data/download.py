"""Downloads, by pooch: progress bar, and a file is fetched once only."""

import importlib.util
import pathlib

from longjax.data import optional


def fetch(url: str, folder) -> pathlib.Path:
  """The path in `folder` of the file at `url`, downloaded if not yet there.

  Raises:
    ModuleNotFoundError: pooch is not installed.
    ConnectionError: no network, or the transfer broke off.
  """
  pooch = optional.require('pooch', f'downloading {url}')
  folder = pathlib.Path(folder)
  name = url.rsplit('/', 1)[-1]
  try:
    path = pooch.retrieve(
      url,
      # What is known of the set is the digest of its unpacked file, which
      # the caller checks.
      known_hash=None,
      fname=name,
      path=folder,
      progressbar=importlib.util.find_spec('tqdm') is not None,
    )
  except optional.require('requests', 'pooch').RequestException as error:
    raise ConnectionError(
      f'cannot download {url} to {folder} ({_first_line(error)}); without a'
      f' network, copy {name} here by other means and pass its path'
    ) from error
  return pathlib.Path(path)


def _first_line(error: Exception) -> str:
  lines = str(error).splitlines()
  return f'{type(error).__name__}: {lines[0] if lines else ""}'
