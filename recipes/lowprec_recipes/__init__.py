"""The recipes that lowprec ships, as Hydra YAML. Hydra's ``pkg://lowprec_recipes`` needs this file."""
