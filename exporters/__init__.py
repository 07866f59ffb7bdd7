"""edgecomp.exporters"""
