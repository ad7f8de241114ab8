def write(cfg, paths, folder): print("report: later", folder)
