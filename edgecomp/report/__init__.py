"""edgecomp.report"""
