def config_for(kernels, kernel, spec, x):
  return None
