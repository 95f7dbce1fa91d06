"""``python -m lowprec``, which is what ``accelerate launch -m lowprec train ...`` runs."""

from lowprec.cli import run

if __name__ == "__main__":
    run()
