"""`python app.py ...` in a clone is the command `dgc ...`."""

from dgc_fastai.cli.main import run

if __name__ == "__main__":
    run()
