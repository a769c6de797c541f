"""xla equals the definition over the grid of options, forward and backward."""

import jax.numpy as jnp
import pytest

from tests.ops import cases
from tests.ops.helpers import check_against_reference


def check(number):
  inputs, pattern, options = cases.draw(number)
  narrow = inputs[0].dtype != jnp.float32
  check_against_reference(inputs, pattern, narrow=narrow, **options)


@pytest.mark.parametrize('number', range(12))
def test_case(number):
  check(number)


@pytest.mark.full
@pytest.mark.parametrize('number', range(12, 400))
def test_more_cases(number):
  check(number)
