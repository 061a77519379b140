"""`python -m cahfp_cli`, the same as the `cahfp` command."""

from cahfp_cli.app import main

if __name__ == "__main__":
    main()
