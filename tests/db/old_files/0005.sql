BEGIN TRANSACTION;
CREATE TABLE aivmm_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT aivmm_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "aivmm_version" VALUES('0005');
CREATE TABLE config (
	digest VARCHAR NOT NULL, 
	precision VARCHAR, 
	settings JSON NOT NULL, 
	CONSTRAINT pk_config PRIMARY KEY (digest)
);
INSERT INTO "config" VALUES('52c6a412eff1ab21','bf16','{"ENABLE_CPU_PINNING":true,"HINT":"LATENCY","INFERENCE_NUM_THREADS":2,"SCALE":0.5}');
INSERT INTO "config" VALUES('95dcbba53d2edb27',NULL,'{"INFERENCE_NUM_THREADS":2,"NAME":"x","PINNED":true,"SCALE":0.1}');
INSERT INTO "config" VALUES('16e4f65d22a2ae53',NULL,'{}');
INSERT INTO "config" VALUES('4960f0793092c115',NULL,'{"n":2}');
INSERT INTO "config" VALUES('d1aa9c3dbfe5e815','bf16','{"n":2}');
INSERT INTO "config" VALUES('32625ad8b2065b31','fp32','{"NUM_STREAMS":1}');
CREATE TABLE device (
	id VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	driver VARCHAR NOT NULL, 
	facts JSON NOT NULL, 
	first_seen_at DATETIME NOT NULL, 
	CONSTRAINT pk_device PRIMARY KEY (id)
);
INSERT INTO "device" VALUES('c88959053d479f3e5933cbe928d771aa','cpu','A CPU, ünïcödé','','{"kind":"cpu","model":"A CPU, \u00fcn\u00efc\u00f6d\u00e9","uid":"","driver":"","memory_bytes":17179869184,"instruction_sets":["avx2","fma"],"cores":2,"power_limit_w":null}','2026-11-26 15:02:24.165889');
INSERT INTO "device" VALUES('b7ed42bedf6942c0b885e69193781f81','gpu','A GPU','580.1','{"kind":"gpu","model":"A GPU","uid":"","driver":"580.1","memory_bytes":150000000000,"instruction_sets":[],"cores":null,"power_limit_w":700}','2026-11-26 15:02:24.174059');
CREATE TABLE environment (
	fingerprint VARCHAR NOT NULL, 
	target VARCHAR NOT NULL, 
	device_model VARCHAR NOT NULL, 
	driver VARCHAR NOT NULL, 
	runtime_version VARCHAR NOT NULL, 
	system VARCHAR NOT NULL, 
	facts JSON NOT NULL, 
	first_seen_at DATETIME NOT NULL, 
	CONSTRAINT pk_environment PRIMARY KEY (fingerprint)
);
INSERT INTO "environment" VALUES('fa781de56fbecd8a2bc4957c33f3a158','openvino:CPU','A CPU, ünïcödé','','2026.4','Linux-x86_64','{"target":"openvino:CPU","device_model":"A CPU, \u00fcn\u00efc\u00f6d\u00e9","driver":"","runtime_version":"2026.4","instruction_sets":["avx2","fma"],"usable_cores":2,"power_limit_w":null,"system":"Linux-x86_64"}','2026-11-26 15:02:24.161181');
INSERT INTO "environment" VALUES('5ea1f304f527cc7e406da85ea943d532','onnxruntime:CUDA:0','A GPU','580.1','1.31','Linux-x86_64','{"target":"onnxruntime:CUDA:0","device_model":"A GPU","driver":"580.1","runtime_version":"1.31","instruction_sets":[],"usable_cores":null,"power_limit_w":700,"system":"Linux-x86_64"}','2026-11-26 15:02:24.173323');
CREATE TABLE lowering (
	id VARCHAR NOT NULL, 
	content VARCHAR NOT NULL, 
	precision VARCHAR NOT NULL, 
	recipe JSON NOT NULL, 
	lowered_content VARCHAR, 
	reason TEXT NOT NULL, 
	data VARCHAR NOT NULL, 
	accuracy JSON NOT NULL, 
	weight_bytes BIGINT, 
	duration_s DOUBLE NOT NULL, 
	made_at DATETIME NOT NULL, calibration VARCHAR, 
	CONSTRAINT pk_lowering PRIMARY KEY (id)
);
INSERT INTO "lowering" VALUES('0197f0a0000070008000000000000002','content-of-the-whole','int8','{"algorithm":"smoothquant","samples":300}','content-in-int8','','real','{"cosine":0.9995}',1250000000,12.5,'2026-05-04 03:02:01.123456',NULL);
CREATE TABLE model (
	id VARCHAR NOT NULL, 
	content VARCHAR NOT NULL, 
	batch INTEGER NOT NULL, 
	structure VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	category VARCHAR NOT NULL, 
	node_count INTEGER NOT NULL, 
	flops DOUBLE, 
	weight_bytes BIGINT NOT NULL, 
	data_dependent BOOLEAN NOT NULL, 
	facts JSON NOT NULL, 
	cut_points JSON NOT NULL, 
	first_seen_at DATETIME NOT NULL, pieces JSON, 
	CONSTRAINT pk_model PRIMARY KEY (id), 
	CONSTRAINT uq_model_content_batch UNIQUE (content, batch)
);
INSERT INTO "model" VALUES('83e460e9e0e29e46a2b737d752cc1fc9','content-of-the-whole',4,'structure-of-the-whole','abababababababababababababababababababababababababababababababab','squeezenet','CNN',4,NULL,5000000000,0,'{"name":"squeezenet","path":"models/squeezenet.onnx","sha256":"abababababababababababababababababababababababababababababababab","category":{"name":"CNN","reason":"26 Conv"},"inputs":[["x","float32",[1,3,null,224]]],"outputs":[["y","string",[]]],"opset":17,"ir_version":8,"batch":4,"batchable":true,"notes":["opset 1 raised to 17"]}','[[2,32,[["t","float32",[1,null,8]]]],[3,null,[["t","float32",[1,null,8]],["t","float32",[1,null,8]]]]]','2026-11-26 15:02:24.185135','[["r0","l"],["r1","r2 <\u2603>\n"]]');
CREATE TABLE model_block (
	model_id VARCHAR NOT NULL, 
	position INTEGER NOT NULL, 
	structure VARCHAR NOT NULL, 
	content VARCHAR NOT NULL, 
	first_node INTEGER NOT NULL, 
	last_node INTEGER NOT NULL, 
	weight_bytes BIGINT NOT NULL, 
	inputs JSON NOT NULL, 
	outputs JSON NOT NULL, 
	CONSTRAINT pk_model_block PRIMARY KEY (model_id, position), 
	CONSTRAINT fk_model_block_model_id_model FOREIGN KEY(model_id) REFERENCES model (id) ON DELETE CASCADE, 
	CONSTRAINT fk_model_block_structure_segment FOREIGN KEY(structure) REFERENCES segment (structure)
)
 WITHOUT ROWID

;
INSERT INTO "model_block" VALUES('83e460e9e0e29e46a2b737d752cc1fc9',0,'same','content-0',0,1,10,'[["t","float32",[1,null,8]]]','[["t","float32",[1,null,8]]]');
INSERT INTO "model_block" VALUES('83e460e9e0e29e46a2b737d752cc1fc9',1,'same','content-1',2,3,11,'[["t","float32",[1,null,8]]]','[["t","float32",[1,null,8]]]');
CREATE TABLE model_operator (
	model_id VARCHAR NOT NULL, 
	signature VARCHAR NOT NULL, 
	position INTEGER NOT NULL, 
	node_count INTEGER NOT NULL, 
	nodes JSON NOT NULL, 
	CONSTRAINT pk_model_operator PRIMARY KEY (model_id, signature), 
	CONSTRAINT fk_model_operator_model_id_model FOREIGN KEY(model_id) REFERENCES model (id) ON DELETE CASCADE, 
	CONSTRAINT fk_model_operator_signature_operator FOREIGN KEY(signature) REFERENCES operator (signature)
)
 WITHOUT ROWID

;
INSERT INTO "model_operator" VALUES('83e460e9e0e29e46a2b737d752cc1fc9','s-loop',1,1,'["l"]');
INSERT INTO "model_operator" VALUES('83e460e9e0e29e46a2b737d752cc1fc9','s-relu',0,3,'["r0","r1","r2"]');
CREATE TABLE operator (
	signature VARCHAR NOT NULL, 
	op_type VARCHAR NOT NULL, 
	domain VARCHAR NOT NULL, 
	description TEXT NOT NULL, 
	flops DOUBLE, 
	io_bytes BIGINT, 
	data_dependent BOOLEAN NOT NULL, 
	CONSTRAINT pk_operator PRIMARY KEY (signature)
);
INSERT INTO "operator" VALUES('s-loop','Loop','x.y','Loop',NULL,NULL,1);
INSERT INTO "operator" VALUES('s-relu','Relu','','Relu 1x8',8.0,64,0);
CREATE TABLE "plan" (
	id VARCHAR NOT NULL, 
	run_id VARCHAR NOT NULL, 
	path VARCHAR NOT NULL, 
	content JSON NOT NULL, 
	saved_at DATETIME NOT NULL, 
	CONSTRAINT pk_plan PRIMARY KEY (id), 
	CONSTRAINT fk_plan_run_id_run FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT uq_plan_run_id UNIQUE (run_id)
);
INSERT INTO "plan" VALUES('01a2186111207c22b7af06c3c48caf91','0197f0a0-0000-7000-8000-000000000001','squeezenet.aivmm','{"schema":1,"stages":[{"config":{"a":true,"b":1,"c":1.5},"blocks":[0,1]}],"\u00fcn\u00efc\u00f6d\u00e9":null}','2026-11-26 15:02:24.288777');
CREATE TABLE probe (
	id VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	subject VARCHAR NOT NULL, 
	target VARCHAR NOT NULL, 
	environment VARCHAR NOT NULL, 
	config_digest VARCHAR NOT NULL, 
	batch INTEGER NOT NULL, 
	callers INTEGER NOT NULL, 
	state VARCHAR NOT NULL, 
	samples BLOB, 
	reason TEXT NOT NULL, 
	output TEXT NOT NULL, 
	effective_digest VARCHAR, 
	placement JSON, 
	race VARCHAR NOT NULL, 
	measured_at DATETIME NOT NULL, metrics JSON, cautions JSON, 
	CONSTRAINT pk_probe PRIMARY KEY (id), 
	CONSTRAINT fk_probe_config_digest_config FOREIGN KEY(config_digest) REFERENCES config (digest), 
	CONSTRAINT fk_probe_effective_digest_config FOREIGN KEY(effective_digest) REFERENCES config (digest), 
	CONSTRAINT fk_probe_environment_environment FOREIGN KEY(environment) REFERENCES environment (fingerprint)
);
INSERT INTO "probe" VALUES('01a2186110c8708197135eeab8a42e81','cb0f4826bee6f8325af220eb279074dd','segment','same','openvino:CPU','fa781de56fbecd8a2bc4957c33f3a158','52c6a412eff1ab21',4,2,'measured',X'010000000400000004000000010000007B14AE47E17A543F2F6EA301BC05523F0100000000000000763B7730D142EE7FFA7E6ABC7493683F000000000000000001000000FFFFFFFF','','','95dcbba53d2edb27','{"CPU":12}','race-1','2026-11-26 15:02:24.200118','{"compile_s":0.5,"peak_memory_bytes":100000000.0,"tiny":5e-324}','[{"code":"spread","message":"wide","advice":"close the browser"},{"code":"few-samples","message":"4","advice":""}]');
INSERT INTO "probe" VALUES('01a2186110ca73eebf66e0e755f868e0','528a7470d19f65c5655050d5851b2e48','operator','s-loop','onnxruntime:CUDA:0','5ea1f304f527cc7e406da85ea943d532','52c6a412eff1ab21',1,2,'refused',NULL,'not implemented: Loop','',NULL,NULL,'','2026-11-26 15:02:24.202281',NULL,NULL);
INSERT INTO "probe" VALUES('01a2186110cc7651bae66b4e564a2180','3634aecda150dfd62c73bb8ef2371e2f','segment','same','onnxruntime:CUDA:0','5ea1f304f527cc7e406da85ea943d532','52c6a412eff1ab21',1,2,'failed',NULL,'segfault','last words ☃',NULL,NULL,'','2026-11-26 15:02:24.204426',NULL,NULL);
INSERT INTO "probe" VALUES('01a2186110ce76e5ad6b57bf53bd265c','fe4a92fc459a97c16bb979f7bbedaf8e','transfer','float32 1x8','openvino:CPU','fa781de56fbecd8a2bc4957c33f3a158','52c6a412eff1ab21',1,2,'measured',X'010000000100000000000000000000008DEDB5A0F7C6B03E','','','16e4f65d22a2ae53','{}','','2026-11-26 15:02:24.206465','{}',NULL);
INSERT INTO "probe" VALUES('01a2186110d37351a6daf5c2940315c2','cb0f4826bee6f8325af220eb279074dd','segment','same','openvino:CPU','fa781de56fbecd8a2bc4957c33f3a158','52c6a412eff1ab21',4,2,'measured',X'010000000400000004000000010000007B14AE47E17A543F2F6EA301BC05523F0100000000000000763B7730D142EE7FFA7E6ABC7493683F000000000000000001000000FFFFFFFF','','','95dcbba53d2edb27','{"CPU":12}','race-2','2026-11-26 15:02:24.211260','{"compile_s":0.5,"peak_memory_bytes":100000000.0,"tiny":5e-324}','[{"code":"spread","message":"wide","advice":"close the browser"},{"code":"few-samples","message":"4","advice":""}]');
INSERT INTO "probe" VALUES('01a218611133750ca87933fd6cd7fcef','5af8f9f55ef10196e9a425e087a17e67','transfer','256 B from openvino:CPU@fa781de56fbecd8a2bc4957c33f3a158.32625ad8b2065b31','onnxruntime:CUDA:0','5ea1f304f527cc7e406da85ea943d532','16e4f65d22a2ae53',1,1,'measured',X'0100000002000000000000000000000054E41071732AC93E8DEDB5A0F7C6C03E','','','16e4f65d22a2ae53','{}','01a2186111337250a6f0161c72d2efe7','2026-11-26 15:02:24.307355','{"cost_s":-1e-07,"source_s":1e-06,"destination_s":5e-07}','[{"code":"spread","message":"wide","advice":""}]');
INSERT INTO "probe" VALUES('01a218611133750dab0216adbbf244b4','2928b44c502b25dbe751af334a70c3e2','transfer','4096 B from openvino:CPU@fa781de56fbecd8a2bc4957c33f3a158.32625ad8b2065b31','onnxruntime:CUDA:0','5ea1f304f527cc7e406da85ea943d532','16e4f65d22a2ae53',1,1,'measured',X'0100000002000000000000000000000054E41071732AC93E8DEDB5A0F7C6C03E','','','16e4f65d22a2ae53','{}','01a2186111337250a6f0161c72d2efe7','2026-11-26 15:02:24.307355','{"cost_s":-1e-07,"source_s":1e-06,"destination_s":5e-07}','[{"code":"spread","message":"wide","advice":""}]');
INSERT INTO "probe" VALUES('01a218611133750eae9f3d02a7341604','85d56df94274d9169d4c7c84a52711ac','transfer','67108864 B from openvino:CPU@fa781de56fbecd8a2bc4957c33f3a158.32625ad8b2065b31','onnxruntime:CUDA:0','5ea1f304f527cc7e406da85ea943d532','16e4f65d22a2ae53',1,1,'measured',X'0100000002000000000000000000000054E41071732AC93E8DEDB5A0F7C6C03E','','','16e4f65d22a2ae53','{}','01a2186111337250a6f0161c72d2efe7','2026-11-26 15:02:24.307355','{"cost_s":-1e-07,"source_s":1e-06,"destination_s":5e-07}','[{"code":"spread","message":"wide","advice":""}]');
CREATE TABLE proof (
	id VARCHAR NOT NULL, 
	run_id VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	role VARCHAR NOT NULL, 
	target VARCHAR NOT NULL, 
	config_digest VARCHAR NOT NULL, 
	batch INTEGER NOT NULL, 
	callers INTEGER NOT NULL, 
	eligible BOOLEAN NOT NULL, 
	why_not TEXT NOT NULL, 
	samples BLOB, 
	ratio DOUBLE, 
	ratio_low DOUBLE, 
	ratio_high DOUBLE, 
	verdict VARCHAR, 
	metrics JSON NOT NULL, 
	cautions JSON NOT NULL, 
	proved_at DATETIME NOT NULL, 
	CONSTRAINT pk_proof PRIMARY KEY (id), 
	CONSTRAINT fk_proof_config_digest_config FOREIGN KEY(config_digest) REFERENCES config (digest), 
	CONSTRAINT fk_proof_run_id_run FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE
);
INSERT INTO "proof" VALUES('01a21861111575a2b58c4c8bba60c9cd','0197f0a0-0000-7000-8000-000000000001','plan','plan','openvino:CPU','d1aa9c3dbfe5e815',4,1,1,'',X'01000000020000000200000000000000000000000000F03F00000000000000400000000001000000',NULL,NULL,NULL,NULL,'{"throughput_per_s":12.5}','[{"code":"spread","message":"m","advice":"a"}]','2026-11-26 15:02:24.277454');
INSERT INTO "proof" VALUES('01a21861112070818046099937a5fd0f','0197f0a0-0000-7000-8000-000000000001','ORT default','baseline','onnxruntime:CPU','16e4f65d22a2ae53',1,1,0,'over the accuracy limit',NULL,1.9,1.8,2.0,'faster','{}','[]','2026-11-26 15:02:24.288098');
CREATE TABLE run (
	id VARCHAR NOT NULL, 
	request VARCHAR NOT NULL, 
	started_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	status VARCHAR NOT NULL, 
	model_id VARCHAR, 
	model_name VARCHAR NOT NULL, 
	facts JSON NOT NULL, 
	objective VARCHAR NOT NULL, 
	constraints JSON NOT NULL, 
	options JSON NOT NULL, 
	command TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	aivmm_version VARCHAR NOT NULL, 
	summary JSON NOT NULL, 
	notes JSON NOT NULL, 
	unavailable JSON NOT NULL, 
	CONSTRAINT pk_run PRIMARY KEY (id), 
	CONSTRAINT fk_run_model_id_model FOREIGN KEY(model_id) REFERENCES model (id)
);
INSERT INTO "run" VALUES('0197f0a0-0000-7000-8000-000000000001','request','2026-05-04 03:02:01.123456','2026-05-04 03:03:02.623456','complete','83e460e9e0e29e46a2b737d752cc1fc9','squeezenet','{"name":"squeezenet","path":"models/squeezenet.onnx","sha256":"abababababababababababababababababababababababababababababababab","category":{"name":"CNN","reason":"26 Conv"},"inputs":[["x","float32",[1,3,null,224]]],"outputs":[["y","string",[]]],"opset":17,"ir_version":8,"batch":4,"batchable":true,"notes":["opset 1 raised to 17"]}','latency','["latency<100ms","cosine>=0.999"]','{"budget_s":60,"targets":["openvino"],"fresh":false,"batch":null}','aivmm-tune squeezenet.onnx',1099511627776,'0.1.0','{"schema":1,"plan":{"batch":4}}','["no GPU"]','[{"target":"openvino:GPU","reason":"no driver","advice":"install it"}]');
CREATE TABLE run_environment (
	run_id VARCHAR NOT NULL, 
	environment VARCHAR NOT NULL, 
	position INTEGER NOT NULL, 
	CONSTRAINT pk_run_environment PRIMARY KEY (run_id, environment), 
	CONSTRAINT fk_run_environment_environment_environment FOREIGN KEY(environment) REFERENCES environment (fingerprint), 
	CONSTRAINT fk_run_environment_run_id_run FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "run_environment" VALUES('0197f0a0-0000-7000-8000-000000000001','5ea1f304f527cc7e406da85ea943d532',0);
INSERT INTO "run_environment" VALUES('0197f0a0-0000-7000-8000-000000000001','fa781de56fbecd8a2bc4957c33f3a158',1);
CREATE TABLE run_probe (
	run_id VARCHAR NOT NULL, 
	probe_id VARCHAR NOT NULL, 
	reused BOOLEAN NOT NULL, 
	CONSTRAINT pk_run_probe PRIMARY KEY (run_id, probe_id), 
	CONSTRAINT fk_run_probe_probe_id_probe FOREIGN KEY(probe_id) REFERENCES probe (id) ON DELETE CASCADE, 
	CONSTRAINT fk_run_probe_run_id_run FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "run_probe" VALUES('0197f0a0-0000-7000-8000-000000000001','01a2186110c8708197135eeab8a42e81',1);
INSERT INTO "run_probe" VALUES('0197f0a0-0000-7000-8000-000000000001','01a2186110ca73eebf66e0e755f868e0',0);
INSERT INTO "run_probe" VALUES('0197f0a0-0000-7000-8000-000000000001','01a2186110cc7651bae66b4e564a2180',0);
INSERT INTO "run_probe" VALUES('0197f0a0-0000-7000-8000-000000000001','01a2186110ce76e5ad6b57bf53bd265c',0);
INSERT INTO "run_probe" VALUES('0197f0a0-0000-7000-8000-000000000001','01a2186110d37351a6daf5c2940315c2',0);
CREATE TABLE segment (
	structure VARCHAR NOT NULL, 
	op_types JSON NOT NULL, 
	flops DOUBLE, 
	data_dependent BOOLEAN NOT NULL, 
	CONSTRAINT pk_segment PRIMARY KEY (structure)
);
INSERT INTO "segment" VALUES('same','{"Relu":2}',1000000.0,0);
CREATE TABLE study (
	id VARCHAR NOT NULL, 
	run_id VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, objectives JSON, front JSON, importance JSON, 
	CONSTRAINT pk_study PRIMARY KEY (id), 
	CONSTRAINT fk_study_run_id_run FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT uq_study_run_id_name UNIQUE (run_id, name)
);
INSERT INTO "study" VALUES('01a2186110d9787f89a504a2a5f80d41','0197f0a0-0000-7000-8000-000000000001','search','["latency","size"]','[3,5]','[{"objective":"size","target":"openvino:CPU","knob":"n","share":0.1,"trials":9}]');
INSERT INTO "study" VALUES('01a21861110076fca2893ecfd588f7d1','0197f0a0-0000-7000-8000-000000000001','batch',NULL,NULL,NULL);
CREATE TABLE target (
	id VARCHAR NOT NULL, 
	runtime VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	runtime_version VARCHAR NOT NULL, 
	precisions JSON NOT NULL, 
	device_id VARCHAR NOT NULL, 
	environment VARCHAR NOT NULL, 
	first_seen_at DATETIME NOT NULL, 
	CONSTRAINT pk_target PRIMARY KEY (id), 
	CONSTRAINT fk_target_device_id_device FOREIGN KEY(device_id) REFERENCES device (id), 
	CONSTRAINT fk_target_environment_environment FOREIGN KEY(environment) REFERENCES environment (fingerprint)
);
INSERT INTO "target" VALUES('e03eb21800038c5aa4e3dd9b9e6628a3','openvino','CPU','2026.4','["fp32","bf16"]','c88959053d479f3e5933cbe928d771aa','fa781de56fbecd8a2bc4957c33f3a158','2026-11-26 15:02:24.171614');
INSERT INTO "target" VALUES('40ca5986c88b6e92a3a6f398ffaff641','onnxruntime','CUDA:0','1.31','["fp32","f16","int8"]','b7ed42bedf6942c0b885e69193781f81','5ea1f304f527cc7e406da85ea943d532','2026-11-26 15:02:24.174996');
CREATE TABLE "transfer" (
	probe_id VARCHAR NOT NULL, 
	source VARCHAR NOT NULL, 
	destination VARCHAR NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	source_environment VARCHAR, 
	source_config_digest VARCHAR, 
	CONSTRAINT pk_transfer PRIMARY KEY (probe_id), 
	CONSTRAINT fk_transfer_probe_id_probe FOREIGN KEY(probe_id) REFERENCES probe (id) ON DELETE CASCADE, 
	CONSTRAINT fk_transfer_source_environment_environment FOREIGN KEY(source_environment) REFERENCES environment (fingerprint), 
	CONSTRAINT fk_transfer_source_config_digest_config FOREIGN KEY(source_config_digest) REFERENCES config (digest)
);
INSERT INTO "transfer" VALUES('01a2186110ce76e5ad6b57bf53bd265c','openvino:CPU','onnxruntime:CUDA:0',8589934592,NULL,NULL);
INSERT INTO "transfer" VALUES('01a218611133750ca87933fd6cd7fcef','openvino:CPU','onnxruntime:CUDA:0',256,'fa781de56fbecd8a2bc4957c33f3a158','32625ad8b2065b31');
INSERT INTO "transfer" VALUES('01a218611133750dab0216adbbf244b4','openvino:CPU','onnxruntime:CUDA:0',4096,'fa781de56fbecd8a2bc4957c33f3a158','32625ad8b2065b31');
INSERT INTO "transfer" VALUES('01a218611133750eae9f3d02a7341604','openvino:CPU','onnxruntime:CUDA:0',67108864,'fa781de56fbecd8a2bc4957c33f3a158','32625ad8b2065b31');
CREATE TABLE trial (
	id VARCHAR NOT NULL, 
	study_id VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	target VARCHAR NOT NULL, 
	config_digest VARCHAR NOT NULL, 
	batch INTEGER NOT NULL, 
	callers INTEGER NOT NULL, 
	state VARCHAR NOT NULL, 
	value DOUBLE, 
	low DOUBLE, 
	high DOUBLE, 
	median_s DOUBLE, 
	reused BOOLEAN NOT NULL, 
	reason TEXT NOT NULL, 
	duration_s DOUBLE NOT NULL, asked BOOLEAN, policy JSON, metrics JSON, 
	CONSTRAINT pk_trial PRIMARY KEY (id), 
	CONSTRAINT fk_trial_config_digest_config FOREIGN KEY(config_digest) REFERENCES config (digest), 
	CONSTRAINT fk_trial_study_id_study FOREIGN KEY(study_id) REFERENCES study (id) ON DELETE CASCADE, 
	CONSTRAINT uq_trial_study_id_number UNIQUE (study_id, number)
);
INSERT INTO "trial" VALUES('01a2186110dc70c4a697e53fd166389f','01a2186110d9787f89a504a2a5f80d41',4,'openvino:CPU','4960f0793092c115',4,2,'refused',NULL,NULL,NULL,NULL,1,'no',0.5,0,NULL,'{}');
INSERT INTO "trial" VALUES('01a2186110fe7a228d378a50251662c8','01a2186110d9787f89a504a2a5f80d41',3,'openvino:CPU','4960f0793092c115',4,2,'complete',0.91,0.9,0.92,0.001,0,'',0.5,0,NULL,'{}');
INSERT INTO "trial" VALUES('01a2186111007e7abf2a648c522ed6e3','01a21861110076fca2893ecfd588f7d1',3,'openvino:CPU','4960f0793092c115',8,2,'complete',0.91,0.9,0.92,0.001,0,'',0.5,0,NULL,'{}');
INSERT INTO "trial" VALUES('01a21861110874239d8d622f01f51359','01a2186110d9787f89a504a2a5f80d41',5,'openvino:CPU','4960f0793092c115',4,2,'complete',0.91,0.9,0.92,0.001,0,'',0.5,1,'{"targets":{"openvino:CPU":"{}"},"most_pieces":2,"cut_price":0.5,"contiguous":true}','{"latency":0.001,"tiny":5e-324}');
CREATE INDEX ix_environment_target ON environment (target);
CREATE INDEX ix_target_device_id ON target (device_id);
CREATE INDEX ix_target_environment ON target (environment);
CREATE INDEX ix_model_name ON model (name);
CREATE INDEX ix_model_sha256 ON model (sha256);
CREATE INDEX ix_model_structure ON model (structure);
CREATE INDEX ix_operator_op_type ON operator (op_type);
CREATE INDEX ix_model_operator_signature ON model_operator (signature);
CREATE INDEX ix_model_block_content ON model_block (content);
CREATE INDEX ix_model_block_structure ON model_block (structure);
CREATE INDEX ix_probe_environment_kind ON probe (environment, kind);
CREATE INDEX ix_lowering_content ON lowering (content);
CREATE INDEX ix_lowering_lowered_content ON lowering (lowered_content);
CREATE INDEX ix_run_model_id ON run (model_id);
CREATE INDEX ix_run_model_name ON run (model_name);
CREATE INDEX ix_run_request_started_at ON run (request, started_at);
CREATE INDEX ix_run_started_at ON run (started_at);
CREATE INDEX ix_run_probe_probe_id ON run_probe (probe_id);
CREATE INDEX ix_run_environment_environment ON run_environment (environment);
CREATE INDEX ix_proof_run_id ON proof (run_id);
CREATE INDEX ix_transfer_source_destination ON transfer (source, destination);
CREATE INDEX ix_probe_subject_key_id ON probe (subject, "key", id);
COMMIT;
