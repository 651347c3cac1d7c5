"""`python -m pylitefs` is the command `litefs`."""

from pylitefs.cli.main import main

if __name__ == "__main__":
    main()
