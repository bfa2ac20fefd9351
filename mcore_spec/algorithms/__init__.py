"""One algorithm a file: how it is configured, built and exported. `config.ALGORITHMS` names them."""
