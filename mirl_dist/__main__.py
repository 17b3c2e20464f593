from mirl_dist.cli import main

main()
