from reapc.cli.main import main

main()
