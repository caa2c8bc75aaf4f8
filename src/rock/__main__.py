"""`python -m rock`: the command line."""

from rock.cli.main import main

if __name__ == "__main__":
    main()
