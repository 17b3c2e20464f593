from mirl_dist.cli.app import main

main()
