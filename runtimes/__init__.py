"""edgecomp.runtimes"""
